"""Pods in real microVMs, as a user runs them: one with everything, and jobs with a disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.pods import CUBECACHE, PodHost, make_image, until

from cube.keeper.logfile import LogQuery
from cube.orchestrator import Cube
from imagecache.errors import NotFound, Unavailable

SINK = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: conf}
data: {greeting: "hello from config\\n", LEVEL: "3"}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {token: s3cret}
---
apiVersion: v1
kind: Pod
metadata: {name: sink, labels: {app: sink}}
spec:
  terminationGracePeriodSeconds: 5
  initContainers:
  - name: prepare
    image: IMAGE
    command: [sh, -c, "echo prepared > /shared/page; echo init done"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  containers:
  - name: web
    image: IMAGE
    command: [sh, -c, "cat /shared/page; exec busybox httpd -f -p 8080 -h /shared"]
    ports: [{containerPort: 8080, name: http, hostPort: PORT}]
    readinessProbe: {httpGet: {port: http, path: /page}, periodSeconds: 1, timeoutSeconds: 20}
    volumeMounts: [{name: shared, mountPath: /shared}]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
  - name: side
    image: IMAGE
    command:
    - sh
    - -c
    - |
      cat /conf/greeting; stat -c %a:%u /keys/token; cat /keys/token; echo
      echo $LEVEL $NAME $MEM; cat /down/labels; echo
      touch /conf/x 2>/dev/null || echo read-only; stat -f -c %T /mem
      trap 'echo ended well; exit 0' TERM
      while true; do date >> /shared/log; sleep 1; done
    envFrom: [{configMapRef: {name: conf}}]
    env:
    - {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: MEM, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
    resources: {limits: {memory: 64Mi}}
    volumeMounts:
    - {name: shared, mountPath: /shared}
    - {name: conf, mountPath: /conf}
    - {name: keys, mountPath: /keys}
    - {name: down, mountPath: /down}
    - {name: mem, mountPath: /mem}
  - name: crash
    image: IMAGE
    command: [sh, -c, "echo crashing; exit 3"]
    resources: {limits: {memory: 16Mi}}
  volumes:
  - {name: shared, emptyDir: {sizeLimit: 32Mi}}
  - {name: mem, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
  - {name: conf, configMap: {name: conf}}
  - {name: keys, secret: {secretName: keys, defaultMode: 0400}}
  - name: down
    downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
"""
JOB = """\
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "COMMAND"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes:
  - {name: data, udisk: {resourceName: kept}}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodHost]:
    directory = tmp_path_factory.mktemp("pods")
    host = PodHost(directory / "s", make_image(directory / "image"))
    yield host
    host.close()


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def page(port: int, path: str) -> bytes:
    def ask() -> bytes:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=20) as answer,
        ):
            return bytes(answer.read())
        return b""

    return bytes(until(f"an answer on {port}", ask))


async def test_a_pod_with_everything(host: PodHost, tmp_path: Path):
    port = free_port()
    file = host.manifest("sink", SINK.replace("PORT", str(port)))
    host.call("run", file, "--timeout", "240", expect=None)
    status = until(
        "web to be ready, crash to crash twice",
        lambda: (
            (one := host.state_of("sink"))["containers"][1]["ready"]
            and one["containers"][3]["restarts"] >= 1
            and one["state"] == "CrashLoopBackOff"
            and one
        ),
    )
    prepare, _web, side, crash = status["containers"]
    assert (prepare["state"], prepare["code"]) == ("terminated", 0)
    assert (side["state"], crash["code"], crash["last"]["code"]) == ("running", 3, 3)
    assert page(port, "page") == b"prepared\n"
    assert host.call("logs", "sink", "-c", "side") == (
        f'hello from config\n400:0\ns3cret\n3 sink {64 << 20}\napp="sink"\nread-only\ntmpfs\n'
    )
    assert "crashing" in host.call("logs", "sink", "-c", "crash", "--previous")
    assert page(port, "log")  # the other container's file, in the volume that they share
    async with Cube(state_dir=host.state) as cube:
        async with asyncio.timeout(150):
            await exec_and_files(cube, host, tmp_path)
        machine = host.processes("cubecache-vm")
        host.kill("cube.keeper")
        assert page(port, "page") == b"prepared\n"
        with pytest.raises(Unavailable):
            await cube.get("sink")
        until("the keeper to adopt", lambda: host.works("exec", "sink", "--", "true"))
        code, out, _ = await cube.exec("sink", ["cat", "/new/file"], container="web")
        assert (code, out) == (0, b"copied")
        assert host.processes("cubecache-vm") == machine
        assert [one["state"] for one in host.state_of("sink")["containers"][1:3]] == ["running"] * 2
        await cube.delete("sink", grace_seconds=20)
        with pytest.raises(NotFound):
            await cube.get("sink")
        assert await cube.orphans() == []
    assert host.processes("cubecache-vm") == []
    assert list((host.state / "pods").iterdir()) == []


async def exec_and_files(cube: Cube, host: PodHost, tmp_path: Path) -> None:
    code, out, err = await cube.exec("sink", ["sh", "-c", "cat; echo bad >&2; exit 7"], stdin=b"in")
    assert (code, out, err) == (7, b"in", b"bad\n")
    host.call("exec", "sink", "--", "no-such-program", expect=127)
    async with cube.open_exec(
        "sink", ["sh", "-c", "stty size; exit 4"], tty=True, size=(7, 9)
    ) as one:
        written = b"".join([content async for stream, content in one.messages() if stream == 1])
    assert written.strip() == b"7 9" and one.exit is not None and one.exit.code == 4
    source = tmp_path / "new"
    source.mkdir()
    (source / "file").write_text("copied")
    (source / "link").symlink_to("file")
    host.call("cp", str(source), "sink:/")
    host.call("cp", "sink:/new", str(tmp_path / "back"))
    assert (tmp_path / "back" / "file").read_text() == "copied"
    assert (tmp_path / "back" / "link").readlink() == Path("file")
    async with cube.connect("sink", 8080) as wire:
        await wire.write(b"GET /page HTTP/1.0\r\n\r\n")
        await wire.end_input()
        answer = b"".join([content async for _, content in wire.messages()])
    assert answer.endswith(b"prepared\n")
    async with cube.connect("sink", 9) as wire:
        assert [content async for _, content in wire.messages() if content] == []
    assert wire.exit is not None and wire.exit.code == 111
    stats = await cube.stats("sink")
    assert stats["containers"]["web"]["memory_bytes"] > 0
    newest = [line.text async for line in cube.logs("sink", "side", LogQuery(tail=1))]
    assert newest == [b"tmpfs\n"]


def test_a_disk_keeps_its_data_from_job_to_job(host: PodHost):
    writer = host.manifest(
        "w", JOB.replace("NAME", "writer").replace("COMMAND", "echo kept > /data/f; echo done")
    )
    host.call("run", writer)
    until("the job to end", lambda: host.state_of("writer")["state"] == "Completed")
    assert host.call("logs", "writer", "-f") == "done\n"
    until("its machine to be gone", lambda: not host.processes("cubecache-vm"))
    host.call("delete", "writer")
    reader = host.manifest(
        "r", JOB.replace("NAME", "reader").replace("COMMAND", "cat /data/f; exit 9")
    )
    host.call("run", reader, expect=None)
    until("the job to fail", lambda: host.state_of("reader")["phase"] == "Failed")
    status = host.state_of("reader")
    assert status["containers"][0]["code"] == 9, status
    assert host.call("logs", "reader") == "kept\n"
    host.call("delete", "reader")
    assert host.json("list")["pods"] == []


def test_what_is_wrong_is_said_by_commands(host: PodHost):
    bad = host.manifest("bad", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {}\n")
    done = subprocess.run(
        [str(CUBECACHE), "pod", "run", bad],
        capture_output=True,
        text=True,
        env=host.environment,
        timeout=120,
    )
    assert done.returncode == 65 and "line 4: Pod x: spec has no containers" in done.stderr
    host.call("get", "nobody", expect=None)
    host.call("run", str(host.state / "none.yaml"), expect=66)


@pytest.mark.soak
def test_killed_daemon_and_machine_come_back(host: PodHost):
    file = host.manifest("sink", SINK.replace("PORT", str(free_port())))
    host.call("run", file, "--timeout", "240", expect=None)
    sink = lambda: host.state_of("sink")["containers"]  # noqa: E731  (asked again each time)
    until("side to run", lambda: sink()[2]["state"] == "running")
    host.kill("\0serve")
    until("the daemon to be back", lambda: host.processes("\0serve"))
    host.call("exec", "sink", "-c", "side", "--", "sha256sum", "/bin/busybox")
    host.kill("cubecache-vm")
    until("the machine to be back", lambda: host.processes("cubecache-vm"))
    until("side to run again", lambda: sink()[2]["state"] == "running" and sink()[2]["restarts"])
    host.call("delete", "sink", "--grace", "1")
    assert host.processes("cubecache-vm") == [] and host.json("list", "--orphans")["orphans"] == []


@pytest.mark.soak
def test_port_forward_until_interrupted(host: PodHost):
    file = host.manifest("sink", SINK.replace("PORT", str(free_port())))
    host.call("run", file, "--timeout", "240", expect=None)
    until("web to be ready", lambda: host.state_of("sink")["containers"][1]["ready"])
    local = free_port()
    command = [str(CUBECACHE), "pod", "port-forward", "sink", f"{local}:8080"]
    with subprocess.Popen(command, env=host.environment, stderr=subprocess.PIPE) as forwarding:
        try:
            assert page(local, "page") == b"prepared\n"
        finally:
            os.kill(forwarding.pid, signal.SIGINT)
            forwarding.wait(timeout=60)
    host.call("delete", "sink", "--grace", "1")
