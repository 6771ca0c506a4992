"""`cubecache pod ...`: run, list, get, logs, exec, stop, delete, watch and stats of pods."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from cube.keeper.logfile import LogQuery
from cube.keeper.sets import SetStatus
from cube.keeper.status import PodStatus
from cube.orchestrator import READY_SECONDS, Cube
from cube.pod.model import DRIVERS
from cube.podstreams import copy_files, forward_ports, run_program
from imagecache.errors import UsageError
from imagecache.session import Session, json_option

T = TypeVar("T")
_TROUBLE = 1


@click.group()
def pod() -> None:
    """Run Kubernetes pods in microVMs, one machine a pod."""  # shown by `cube.cli`'s lazy twin


def answer_of(
    session: Session, work: Callable[[Cube], Coroutine[Any, Any, T]], *, driver: str | None = None
) -> T:
    """Runs work with an open Cube."""

    async def call() -> T:
        async with Cube(settings=session.settings, driver=driver) as cube:
            await cube.revive()
            return await work(cube)

    return asyncio.run(call())


@pod.command(
    epilog="\b\nExamples:\n  cubecache pod run web.yaml\n  cubecache pod run --no-wait batch.yaml"
)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--no-wait", is_flag=True, help="Return once they are recorded.")
@click.option("--timeout", type=click.FloatRange(min=0.001), default=READY_SECONDS)
@click.option(
    "--driver",
    type=click.Choice(DRIVERS),
    help="What starts machines; default: CUBECACHE_POD_DRIVER, or qemu.",
)
@json_option
@click.pass_obj
def run(session: Session, *, file: Path, no_wait: bool, timeout: float, driver: str | None) -> int:
    """Apply a manifest: start its pods, change those that are different, leave the rest.

    Waits until each pod is ready, over, or in trouble; then the exit status is 1. What pods need
    (`cubecache serve`, the keeper) is started and left running.
    """

    async def work(cube: Cube) -> tuple[list[PodStatus], list[SetStatus]]:
        found = await cube.read(file)
        for note in found.notes:
            session.terminal.note(f"cubecache: {note}")
        pods = [await cube.apply(one) for one in found.pods]
        sets = [await cube.apply_set(one) for one in found.sets]
        if not no_wait:
            waits = [cube.wait(one.key, seconds=timeout) for one in pods]
            set_waits = [cube.wait_set(one.key, seconds=timeout) for one in sets]
            pods, sets = await asyncio.gather(asyncio.gather(*waits), asyncio.gather(*set_waits))
        return pods, sets

    pods, sets = answer_of(session, work, driver=driver)
    answer = {name: [one.model_dump() for one in group] for name, group in _named(pods, sets)}
    lines = [*map(_line, pods), *map(_set_line, sets)]
    session.terminal.answer(answer, "\n".join(lines))
    good = all(one.ready or one.phase == "Succeeded" for one in pods)
    return 0 if no_wait or (good and all(one.settled for one in sets)) else _TROUBLE


@pod.command("list", epilog="\b\nExamples:\n  cubecache pod list\n  cubecache pod list --orphans")
@click.option("--orphans", is_flag=True, help="What looks like a pod's and belongs to none.")
@click.option("--sets", is_flag=True, help="The sets instead of the pods.")
@json_option
@click.pass_obj
def list_(session: Session, *, orphans: bool, sets: bool) -> None:
    """List pods."""
    if sets:
        known = answer_of(session, lambda cube: cube.sets())
        rows = [("NAME", "READY", "CURRENT", "WANTED")]
        rows += [(o.key, str(o.ready), str(o.current), str(o.replicas)) for o in known]
        session.terminal.answer({"sets": [one.model_dump() for one in known]}, table_text(rows))
        return
    if orphans:
        found = answer_of(session, lambda cube: cube.orphans())
        left = [("KIND", "NAME", "POD")]
        left += [(one["kind"], one["name"], one["pod"]) for one in found]
        session.terminal.answer({"orphans": found}, table_text(left))
        return
    pods = answer_of(session, lambda cube: cube.list())
    rows_: list[tuple[str, ...]] = [("NAME", "READY", "STATE", "RESTARTS", "AGE")]
    rows_ += [_row(status) for status in pods]
    session.terminal.answer({"pods": [one.model_dump() for one in pods]}, table_text(rows_))


@pod.command(epilog="\b\nExamples:\n  cubecache pod get web")
@click.argument("name")
@json_option
@click.pass_obj
def get(session: Session, *, name: str) -> None:
    """Show one pod."""
    status = answer_of(session, lambda cube: cube.get(name))
    session.terminal.answer(status.model_dump(), _described(status))


@pod.command(epilog="\b\nExamples:\n  cubecache pod stats web")
@click.argument("name")
@json_option
@click.pass_obj
def stats(session: Session, *, name: str) -> None:
    """Show what a pod uses now."""
    answer = answer_of(session, lambda cube: cube.stats(name))
    session.terminal.answer(answer, json.dumps(answer, indent=2))


@pod.command(epilog="\b\nExamples:\n  cubecache pod watch\n  cubecache pod watch web")
@click.argument("name", required=False)
@click.pass_obj
def watch(session: Session, *, name: str | None) -> None:
    """Print each change of a pod, or of all; a JSON object a line with --json before `pod`."""

    async def work(cube: Cube) -> None:
        async for status in cube.watch():
            if name is None or status.key == name:
                session.terminal.answer(status.model_dump(), _line(status))

    answer_of(session, work)


@pod.command(epilog="\b\nExamples:\n  cubecache pod logs web")
@click.argument("name")
@click.option("-c", "--container", metavar="NAME")
@click.option("-f", "--follow", is_flag=True, help="Wait for more, until the pod is over.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", type=click.FloatRange(min=0), metavar="SECONDS", help="Only newer ones.")
@click.option("--previous", is_flag=True, help="Of the run before the last start.")
@click.option("--timestamps", is_flag=True)
@click.pass_obj
def logs(
    session: Session,
    *,
    name: str,
    container: str | None,
    follow: bool,
    tail: int | None,
    since: float | None,
    previous: bool,
    timestamps: bool,
) -> None:
    """Print what a container wrote."""
    query = LogQuery(
        previous=previous,
        since=time.time() - since if since is not None else 0.0,
        tail=tail,
        follow=follow,
    )

    async def work(cube: Cube) -> None:
        async for line in cube.logs(name, container, query):
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime(line.at)).encode()
            text = stamp + line.text if timestamps else line.text
            click.echo(text, nl=False, err=line.stream == "stderr")

    answer_of(session, work)


@pod.command(
    "exec",
    epilog="\b\nExamples:\n  cubecache pod exec web -- nginx -t\n  cubecache pod exec -t web -- sh",
)
@click.argument("name")
@click.argument("command", metavar="-- CMD ARG...", nargs=-1, type=click.UNPROCESSED)
@click.option("-c", "--container", metavar="NAME")
@click.option("-i", "--interactive", is_flag=True, help="Give the program this command's stdin.")
@click.option("-t", "--tty", is_flag=True, help="On a terminal; implies -i.")
@click.pass_obj
def exec_(
    session: Session,
    *,
    name: str,
    command: tuple[str, ...],
    container: str | None,
    interactive: bool,
    tty: bool,
) -> int:
    """Run a program in a running container; its exit status is this command's."""
    if not command:
        raise UsageError("no program is named", remedy="give one after --, such as -- sh")

    async def work(cube: Cube) -> int:
        return await run_program(
            cube, name, command, container=container, stdin=interactive or tty, tty=tty
        )

    return answer_of(session, work)


@pod.command(
    epilog="\b\nExamples:\n  cubecache pod cp ./conf web:/etc/conf\n"
    "  cubecache pod cp web:/var/log ./log"
)
@click.argument("source")
@click.argument("target")
@click.option("-c", "--container", metavar="NAME")
@click.pass_obj
def cp(session: Session, *, source: str, target: str, container: str | None) -> None:
    """Copy files into a container or out of it: one of the two is NAME:PATH."""
    answer_of(session, lambda cube: copy_files(cube, source, target, container=container))


@pod.command("port-forward", epilog="\b\nExamples:\n  cubecache pod port-forward web 8080:80")
@click.argument("name")
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT...")
@click.option("--address", default="127.0.0.1", show_default=True)
@click.pass_obj
def port_forward(session: Session, *, name: str, ports: tuple[str, ...], address: str) -> None:
    """Lead ports of this host to a pod's, until interrupted."""

    def say(line: str) -> None:
        session.terminal.note(line)

    answer_of(session, lambda cube: forward_ports(cube, name, ports, address, say))


@pod.command(epilog="\b\nExamples:\n  cubecache pod stop web")
@click.argument("name")
@click.option("--grace", type=click.FloatRange(min=0, max=86400), metavar="SECONDS")
@json_option
@click.pass_obj
def stop(session: Session, *, name: str, grace: float | None) -> None:
    """End a pod's machine and keep the pod; `pod run` starts it again."""
    status = answer_of(session, lambda cube: cube.stop(name, grace_seconds=grace))
    session.terminal.answer(status.model_dump(), f"{name} is stopped")


@pod.command(epilog="\b\nExamples:\n  cubecache pod delete web batch")
@click.argument("names", nargs=-1, required=True)
@click.option("--grace", type=click.FloatRange(min=0, max=86400), metavar="SECONDS")
@json_option
@click.pass_obj
def delete(session: Session, *, names: tuple[str, ...], grace: float | None) -> None:
    """End pods, or sets with their pods, and forget them; returns when their machines are gone."""

    async def end(cube: Cube, name: str) -> PodStatus | SetStatus:
        if any(one.key == name for one in await cube.sets()):
            return await cube.delete_set(name, grace_seconds=grace)
        return await cube.delete(name, grace_seconds=grace)

    async def work(cube: Cube) -> list[PodStatus | SetStatus]:
        return [*await asyncio.gather(*(end(cube, name) for name in names))]

    gone = answer_of(session, work)
    pods = [one for one in gone if isinstance(one, PodStatus)]
    sets = [one for one in gone if isinstance(one, SetStatus)]
    answer = {name: [one.model_dump() for one in group] for name, group in _named(pods, sets)}
    session.terminal.answer(answer, "\n".join(f"{status.key} is deleted" for status in gone))


def _named(
    pods: Sequence[PodStatus], sets: Sequence[SetStatus]
) -> tuple[tuple[str, Sequence[PodStatus | SetStatus]], ...]:
    """The groups of an answer; sets only where there are some."""
    return (("pods", pods), ("sets", sets)) if sets else (("pods", pods),)


def _set_line(status: SetStatus) -> str:
    return f"{status.key} has {status.ready} of {status.replicas} pods ready"


def table_text(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns, the first one the heading."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _line(status: PodStatus) -> str:
    message = status.message or next((one.message for one in status.containers if one.message), "")
    return f"{status.key} is {status.state}{': ' + message if message else ''}"


def _row(status: PodStatus) -> tuple[str, ...]:
    main = [one for one in status.containers if not one.init]
    ready = sum(one.ready for one in main)
    restarts = sum(one.restarts for one in main)
    age = _age(time.time() - status.created)
    return status.key, f"{ready}/{len(main)}", status.state, str(restarts), age


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _described(status: PodStatus) -> str:
    lines = [f"{status.key}: {status.state}", f"uid: {status.uid}"]
    if status.message:
        lines.append(f"message: {status.message}")
    if status.address:
        lines.append(f"address: {status.address}")
    lines += [f"{name}: {seconds:.3f} s" for name, seconds in status.timeline.items()]
    rows = [("CONTAINER", "STATE", "REASON", "EXIT", "RESTARTS", "MESSAGE")]
    for one in status.containers:
        code = str(one.code) if one.state == "terminated" else ""
        name = f"{one.name} (init)" if one.init else one.name
        rows.append((name, one.state, one.reason, code, str(one.restarts), one.message))
    return "\n".join([*lines, table_text(rows)])
