"""`cubecache doctor`: what this host can and cannot do, with the remedy."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from imagecache.composition import opened_catalog, prepare_state_dir
from imagecache.errors import CubecacheError
from imagecache.session import Session, json_option
from imagecache.settings import Settings
from imagecache.store.probe import probe
from imagecache.terminal import size_text, table_text

LOW_SPACE = 5 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `needed` says whether the main job fails without it."""

    what: str
    works: bool
    needed: bool
    detail: str
    remedy: str | None = None


def host_findings(settings: Settings) -> Iterator[Finding]:
    """What the host itself offers."""
    yield Finding("python", sys.version_info >= (3, 11), True, sys.version.split()[0])
    try:
        prepare_state_dir(settings)
        free = shutil.disk_usage(settings.state_dir).free
        yield Finding(
            "state directory",
            free >= LOW_SPACE,
            True,
            f"{settings.state_dir}, {size_text(free)} free",
            "free disk space, or set --state-dir" if free < LOW_SPACE else None,
        )
    except CubecacheError as error:
        yield Finding("state directory", False, True, error.message, error.remedy)
    yield from _mounting()
    yield from _microvms()


def _mounting() -> Iterator[Finding]:
    known = Path("/proc/filesystems").read_text().split()
    yield Finding(
        "erofs in this kernel",
        "erofs" in known
        or bool(list(Path("/lib/modules").glob(f"{os.uname().release}/**/erofs*"))),
        False,
        "for cubecache mount; microVMs bring their own kernel",
    )
    yield Finding(
        "kernel nbd",
        Path("/sys/module/nbd").exists(),
        False,
        "the fastest way to mount; nbdfuse stands in",
        "modprobe nbd",
    )
    fuse = os.access("/dev/fuse", os.R_OK | os.W_OK)
    yield _program("nbdfuse", "libnbd-bin", "for cubecache mount without kernel nbd")
    yield Finding("/dev/fuse", fuse, False, "for cubecache mount without kernel nbd")
    yield Finding("root", os.geteuid() == 0, False, "mounting needs it; nothing else does")


def _microvms() -> Iterator[Finding]:
    machine = os.uname().machine
    package = "qemu-system-x86" if machine == "x86_64" else "qemu-system-arm"
    yield _program(f"qemu-system-{machine}", package, "for cubecache run")
    yield Finding(
        "/dev/kvm",
        os.access("/dev/kvm", os.R_OK | os.W_OK),
        False,
        "microVMs at full speed; emulation stands in",
        "run on a host with hardware virtualisation, as a member of group kvm",
    )
    yield _program("cc", "gcc", "builds the guest agent, once")


def _program(name: str, package: str, purpose: str) -> Finding:
    found = shutil.which(name)
    return Finding(name, found is not None, False, found or purpose, f"apt-get install {package}")


async def store_findings(settings: Settings) -> list[Finding]:
    """What the configured store allows."""
    try:
        async with opened_catalog(settings, ask_anew=True) as (opened, _):
            report = await probe(opened.store, opened.reader)
    except CubecacheError as error:
        return [Finding("store", False, True, error.message, error.remedy)]
    wanted_only = "conditional put"
    return [
        Finding(f"store: {item.verb}", item.ok, item.verb != wanted_only, item.words, item.remedy)
        for item in report.findings
    ]


@click.command(epilog="\b\nExamples:\n  cubecache doctor\n  cubecache doctor --json")
@json_option
@click.pass_obj
def doctor(session: Session) -> int:
    """Say what this host and store can and cannot do, with the remedy for what is missing."""
    findings = list(host_findings(session.settings))
    findings += asyncio.run(store_findings(session.settings))
    rows: list[tuple[str, ...]] = [("WHAT", "STATE", "DETAIL")]
    for finding in findings:
        state = "ok" if finding.works else ("MISSING" if finding.needed else "absent")
        remedy = f" -> {finding.remedy}" if finding.remedy and not finding.works else ""
        rows.append((finding.what, state, finding.detail + remedy))
    session.terminal.answer([asdict(finding) for finding in findings], table_text(rows))
    return 1 if any(finding.needed and not finding.works for finding in findings) else 0
