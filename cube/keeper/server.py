"""The keeper's interface: HTTP over STATE/pods.sock, for its owner alone.

Answers are JSON. `exec` and `connect` are WebSockets: a binary message is one byte, the stream (0
stdin, 1 stdout, 2 stderr), and its bytes; none after the stream byte is the stream's end. A text
message is JSON: the request, then {"resize": [rows, columns]} and {"signal": number} from the
client, {"exit": {...}} or {"error": {...}} from the keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import WSMsgType, web
from pydantic import BaseModel, ConfigDict, ValidationError

from cube.channel.messages import ExecSpec
from cube.keeper.keeper import Keeper
from cube.keeper.podlife import PodLife
from cube.keeper.setkeeping import SetKeeper
from cube.link import GuestLink, GuestProcess, OutputStream
from cube.pod.model import Pod, PodSet
from imagecache.errors import (
    Busy,
    CubecacheError,
    Denied,
    NotFound,
    Rejected,
    Unavailable,
    UsageError,
    as_record,
)

_LOG = logging.getLogger("cube.keeper")
BODY_LIMIT: Final = 16 * 1024 * 1024
MESSAGE_LIMIT: Final = 1024 * 1024
WAIT_LIMIT: Final = 3600.0
_STATUSES: Final = (
    (UsageError, 400),
    (Rejected, 422),
    (NotFound, 404),
    (Denied, 403),
    (Busy, 409),
    (Unavailable, 503),
    (CubecacheError, 500),
)
_KEY: Final = web.AppKey("keeper", Keeper)
_SETS: Final = web.AppKey("sets", SetKeeper)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ExecRequest(BaseModel):
    """The first message of an exec."""

    model_config = ConfigDict(extra="forbid", strict=True)

    container: str = ""
    arguments: list[str]
    environment: list[str] = []
    user: str = ""
    working_directory: str = ""
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    columns: int = 80


def make_application(keeper: Keeper, sets: SetKeeper) -> web.Application:
    """The routes over one keeper and its sets."""
    application = web.Application(client_max_size=BODY_LIMIT, middlewares=[_errors])
    application[_KEY] = keeper
    application[_SETS] = sets
    application.add_routes(
        [
            web.get("/healthz", _health),
            web.post("/v1/pods", _apply),
            web.get("/v1/pods", _list),
            web.get("/v1/watch", _watch),
            web.post("/v1/sets", _apply_set),
            web.get("/v1/sets", _list_sets),
            web.get("/v1/sets/{key:.+}", _get_set),
            web.delete("/v1/sets/{key:.+}", _delete_set),
            web.get("/v1/orphans", _orphans),
            web.get("/v1/pods/{key:.+}/exec", _exec),
            web.get("/v1/pods/{key:.+}/connect", _connect),
            web.get("/v1/pods/{key:.+}/stats", _stats),
            web.post("/v1/pods/{key:.+}/stop", _stop),
            web.get("/v1/pods/{key:.+}", _get),
            web.delete("/v1/pods/{key:.+}", _delete),
        ]
    )
    return application


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except CubecacheError as error:
        status = next(code for kind, code in _STATUSES if isinstance(error, kind))
        return web.json_response(as_record(error), status=status)
    except ValidationError as error:
        return web.json_response(as_record(Rejected(_brief(error))), status=422)


def _brief(error: ValidationError) -> str:
    """What does not fit, without the values: they may be secrets."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:5])


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"pods": len(request.app[_KEY].statuses())})


async def _apply(request: web.Request) -> web.Response:
    pod = Pod.model_validate_json(await request.read())
    return _status(await request.app[_KEY].apply(pod))


async def _list(request: web.Request) -> web.Response:
    pods = [status.model_dump() for status in request.app[_KEY].statuses()]
    return web.json_response({"pods": pods})


async def _get(request: web.Request) -> web.Response:
    keeper, key = request.app[_KEY], request.match_info["key"]
    seconds = _seconds(request, "wait")
    if not seconds:
        return _status(keeper.get(key).status)
    since = int(request.query.get("since", "-1"))
    settled = "settled" in request.query

    def until(status: Any) -> bool:
        return bool(status.settled if settled else status.version > since)

    return _status(await keeper.wait_for(key, until, min(seconds, WAIT_LIMIT)))


async def _delete(request: web.Request) -> web.Response:
    keeper, key = request.app[_KEY], request.match_info["key"]
    return _status(await keeper.delete(key, _seconds(request, "grace")))


async def _stop(request: web.Request) -> web.Response:
    keeper, key = request.app[_KEY], request.match_info["key"]
    return _status(await keeper.stop(key, _seconds(request, "grace")))


async def _apply_set(request: web.Request) -> web.Response:
    wanted = PodSet.model_validate_json(await request.read())
    return _status(await request.app[_SETS].apply(wanted))


async def _list_sets(request: web.Request) -> web.Response:
    return web.json_response({"sets": [one.model_dump() for one in request.app[_SETS].statuses()]})


async def _get_set(request: web.Request) -> web.Response:
    sets, key = request.app[_SETS], request.match_info["key"]
    seconds = _seconds(request, "wait")
    return _status(await sets.wait(key, seconds) if seconds else sets.get(key))


async def _delete_set(request: web.Request) -> web.Response:
    sets, key = request.app[_SETS], request.match_info["key"]
    return _status(await sets.delete(key, _seconds(request, "grace")))


async def _orphans(request: web.Request) -> web.Response:
    found = await request.app[_KEY].orphans()
    return web.json_response({"orphans": [dataclasses.asdict(one) for one in found]})


async def _stats(request: web.Request) -> web.Response:
    life = request.app[_KEY].get(request.match_info["key"])
    stats = await _link(life).stats()
    names = {life.container_id(status.name): status.name for status in life.status.containers}
    answer = dataclasses.asdict(stats)
    answer["containers"] = {
        names[identity]: dataclasses.asdict(one)
        for identity, one in stats.containers.items()
        if identity in names
    }
    return web.json_response(answer)


async def _watch(request: web.Request) -> web.StreamResponse:
    keeper = request.app[_KEY]
    since = request.query.get("since", "-1")
    if not re.fullmatch(r"-?[0-9]{1,18}", since):
        raise Rejected(f"since is a pod's version, and not {since[:40]!r}")
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    with keeper.watching(), contextlib.suppress(ConnectionResetError):
        await response.prepare(request)
        async for status in keeper.watch(int(since)):
            if status is not None:
                await response.write(status.model_dump_json().encode() + b"\n")
            elif request.transport is None or request.transport.is_closing():
                break
    return response


async def _exec(request: web.Request) -> web.StreamResponse:
    life = request.app[_KEY].get(request.match_info["key"])
    link = _link(life)
    socket = web.WebSocketResponse(max_msg_size=MESSAGE_LIMIT)
    await socket.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        try:
            wanted = ExecRequest.model_validate_json(await socket.receive_str(timeout=30))
            name = wanted.container or life.pod.containers[0].name
            status = life.status.container(name)
            if status is None:
                raise NotFound(f"pod {life.pod.key} has no container {name!r}")
            if status.state != "running":
                raise Unavailable(f"container {name} does not run: it is {status.reason}")
            process = link.execute(
                ExecSpec(
                    container=life.container_id(name),
                    arguments=tuple(wanted.arguments),
                    environment=tuple(wanted.environment),
                    user=wanted.user,
                    working_directory=wanted.working_directory,
                    tty=wanted.tty,
                    stdin=wanted.stdin,
                    rows=wanted.rows,
                    cols=wanted.columns,
                )
            )
            await _serve(socket, link, process)
        except CubecacheError as error:
            await socket.send_json({"error": as_record(error)})
        except (ValidationError, TimeoutError, TypeError) as error:
            problem = _brief(error) if isinstance(error, ValidationError) else "no request came"
            await socket.send_json({"error": as_record(UsageError(problem))})
        await socket.close()
    return socket


async def _connect(request: web.Request) -> web.StreamResponse:
    life = request.app[_KEY].get(request.match_info["key"])
    link = _link(life)
    try:
        port = int(request.query["port"])
    except (KeyError, ValueError) as error:
        raise UsageError("the port is not a number") from error
    process = link.connect(port)
    socket = web.WebSocketResponse(max_msg_size=MESSAGE_LIMIT)
    await socket.prepare(request)
    with contextlib.suppress(ConnectionResetError):
        await _serve(socket, link, process)
        await socket.close()
    return socket


async def _serve(socket: web.WebSocketResponse, link: GuestLink, process: GuestProcess) -> None:
    """Carries a process's streams both ways, and its end; a client that goes kills it."""
    feeding = asyncio.create_task(_feed(socket, process))
    carrying = asyncio.gather(_carry(socket, process.stdout, 1), _carry(socket, process.stderr, 2))
    ending = asyncio.create_task(process.wait())
    try:
        done, _ = await asyncio.wait({feeding, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending in done:
            await carrying
            await socket.send_json({"exit": dataclasses.asdict(ending.result())})
    except Unavailable as error:
        await socket.send_json({"error": as_record(error)})
    finally:
        for task in (feeding, carrying, ending):
            task.cancel()
        await asyncio.gather(feeding, carrying, ending, return_exceptions=True)
        link.forget(process)


async def _feed(socket: web.WebSocketResponse, process: GuestProcess) -> None:
    async for message in socket:
        if message.type is WSMsgType.BINARY and message.data[:1] == b"\0":
            if len(message.data) > 1:
                await process.write_input(message.data[1:])
            else:
                await process.end_input()
        elif message.type is WSMsgType.TEXT:
            _control(message.data, process)


def _control(text: str, process: GuestProcess) -> None:
    try:
        wish = json.loads(text)
        if "resize" in wish:
            rows, columns = wish["resize"]
            process.resize(int(rows), int(columns))
        if "signal" in wish:
            process.signal(int(wish["signal"]), group=True)
    except (ValueError, TypeError, CubecacheError) as error:
        _LOG.warning("a client's control message is broken: %s", error)


async def _carry(socket: web.WebSocketResponse, stream: OutputStream, number: int) -> None:
    mark = bytes([number])
    while content := await stream.read():
        await socket.send_bytes(mark + content)
    await socket.send_bytes(mark)


def _link(life: PodLife) -> GuestLink:
    sandbox = life.sandbox
    if sandbox is None or not sandbox.link.greeted.done():
        raise Unavailable(f"pod {life.pod.key} has no running machine: it is {life.status.state}")
    return sandbox.link


def _seconds(request: web.Request, name: str) -> float | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError as error:
        raise UsageError(f"{name} is no number of seconds") from error
    if not 0 <= seconds <= 86400:
        raise UsageError(f"{name} is not between 0 and 86400 seconds")
    return seconds


def _status(status: BaseModel) -> web.Response:
    return web.json_response(status.model_dump())
