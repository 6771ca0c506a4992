"""A stand-in for Firecracker: its API on a unix socket, its vsock device, and its jailer.

Each request is judged by kits/firecracker_schema.json; 204, or 400 with `fault_message`, as its
swagger file says; what is for before the boot only is refused after it. Run as a program:
`python -m kits.firecracker_server SCENARIO [firecracker's or the jailer's arguments]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from jsonschema import Draft202012Validator

SCHEMA = json.loads(Path(__file__).with_name("firecracker_schema.json").read_text())
LATE = "The requested operation is not supported after starting the microVM."


@dataclass(frozen=True)
class Scenario:
    """How it behaves. `journal` gets each request and answer, a JSON line each."""

    journal: str
    refuse: dict[str, str] = field(default_factory=dict)  # path -> fault_message
    die_at: str = ""  # path (or "start": before the socket is made)
    hang_at: str = ""  # path (or "start")
    agent: str = "echo"  # or: absent, babble
    log: str = ""
    console: str = ""

    def program(self, path: Path) -> Path:
        """An executable that behaves so."""
        kits = Path(__file__).parents[1]
        path.with_suffix(".json").write_text(json.dumps(asdict(self)))
        path.write_text(
            f"#!/bin/sh\nPYTHONPATH={kits} exec {sys.executable} -m kits.firecracker_server "
            f'{path.with_suffix(".json")} "$0" "$@"\n'
        )
        path.chmod(0o755)
        return path


def problems(method: str, path: str, body: object, *, started: bool) -> list[str]:
    """What the API would not like of a request."""
    template = path
    parts = path.split("/")
    identity = ""
    if len(parts) == 3:
        identity = parts[2]
        template = {"drives": "/drives/{drive_id}"}.get(parts[1], "/network-interfaces/{iface_id}")
    if method != "PUT" or template not in SCHEMA["paths"]:
        return [f"Invalid request method and/or path: {method} {path}."]
    if started and template in SCHEMA["preboot"]:
        return [LATE]
    reference = {"$ref": f"#/$defs/{SCHEMA['paths'][template]}", "$defs": SCHEMA["$defs"]}
    found = [
        f"{'.'.join(map(str, error.absolute_path)) or 'body'}: {error.message}"
        for error in Draft202012Validator(reference).iter_errors(body)
    ]
    if identity and isinstance(body, dict) and identity not in body.values():
        found.append("The id from the path does not match the id from the body!")
    if identity and not identity.replace("_", "").isalnum():
        found.append("API Resource IDs can only contain alphanumeric characters and underscores.")
    return found


class Firecracker:
    """One machine."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._bodies: dict[str, Any] = {}
        self._started = False
        self._devices: list[asyncio.AbstractServer] = []

    async def run(self, api: Path) -> None:
        if self._scenario.die_at == "start":
            print("Error: cannot open the API socket", file=sys.stderr)
            sys.exit(1)
        if self._scenario.hang_at == "start":
            await asyncio.sleep(3600)
        application = web.Application()
        application.router.add_get("/version", self._version)
        application.router.add_route("*", "/{rest:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, str(api)).start()
        await asyncio.sleep(3600)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"firecracker_version": "1.17.0-dev"})

    async def _answer(self, request: web.Request) -> web.Response:
        scenario = self._scenario
        body = json.loads(await request.read() or b"null")
        if scenario.die_at == request.path:
            print(scenario.console, flush=True)
            os._exit(7)
        if scenario.hang_at == request.path:
            await asyncio.sleep(3600)
        found = problems(request.method, request.path, body, started=self._started)
        if request.path in scenario.refuse:
            found.append(scenario.refuse[request.path])
        if not found:
            self._bodies[request.path] = body
            found += await self._effect(request.path, body)
        with Path(scenario.journal).open("a") as journal:
            line = {"path": request.path, "body": body, "problems": found}
            journal.write(json.dumps(line) + "\n")
        if found:
            return web.json_response({"fault_message": "; ".join(found)}, status=400)
        return web.Response(status=204)

    async def _effect(self, path: str, body: dict[str, Any]) -> list[str]:
        if path == "/logger" and self._scenario.log:
            with Path(body["log_path"]).open("w") as log:
                log.write(self._scenario.log + "\n")
        if path == "/metrics":
            with Path(body["metrics_path"]).open("w") as metrics:
                metrics.write('{"utc_timestamp_ms": 1}\n')
        if path.startswith("/drives/"):
            place = Path(body.get("socket") or body["path_on_host"])
            if not place.exists():
                return [f"No such file or directory: {place}"]
        if path == "/actions" and body["action_type"] == "SendCtrlAltDel":
            asyncio.get_running_loop().call_later(0.05, os._exit, 0)
        if path == "/actions" and body["action_type"] == "InstanceStart":
            missing = [name for name in ("/boot-source", "/vsock") if name not in self._bodies]
            if missing or self._started:
                return [f"cannot start: missing {missing}, started {self._started}"]
            self._started = True
            print(self._scenario.console or "guest boots", flush=True)
            device = self._bodies["/vsock"]["uds_path"]
            self._devices.append(await asyncio.start_unix_server(self._vsock, device))
        return []

    async def _vsock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readline()
        if self._scenario.agent == "babble":
            writer.write(b"HTTP/1.1 400 Bad Request\n")
        elif self._scenario.agent == "echo" and asked == b"CONNECT 1024\n":
            writer.write(b"OK 1073741824\n")
            while received := await reader.read(65536):
                writer.write(received)
                await writer.drain()
        writer.close()


def jail(arguments: list[str], scenario: Scenario) -> None:
    """Does what the jailer does, but for what only root and a mount namespace can."""
    parser = argparse.ArgumentParser()
    for name in ("id", "exec-file", "uid", "gid", "cgroup-version", "parent-cgroup", "netns"):
        parser.add_argument(f"--{name}", required=name in ("id", "exec-file", "uid", "gid"))
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    parser.add_argument("--cgroup", action="append", default=[])
    parser.add_argument("--resource-limit", action="append", default=[])
    at = arguments.index("--")
    given = parser.parse_args(arguments[:at])
    with Path(scenario.journal).open("a") as journal:
        journal.write(json.dumps({"path": "jailer", "body": vars(given), "problems": []}) + "\n")
    program = Path(given.exec_file)
    root = Path(given.chroot_base_dir) / program.name / given.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    os.execv(program, [program.name, f"--id={given.id}", "--start-time-us=1", *arguments[at + 1 :]])


def main() -> None:
    scenario = Scenario(**json.loads(Path(sys.argv[1]).read_text()))
    called, arguments = Path(sys.argv[2]).name, sys.argv[3:]
    if called == "jailer":
        jail(arguments, scenario)
    if arguments == ["--version"]:
        print("Firecracker v1.17.0-dev")
        return
    parser = argparse.ArgumentParser()
    for name in ("api-sock", "id", "start-time-us", "start-time-cpu-us"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args(arguments)
    asyncio.run(Firecracker(scenario).run(Path(given.api_sock)))


if __name__ == "__main__":
    main()
