"""One real microVM with several containers: what the agent does for pods, over its channel."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import subprocess
from pathlib import Path

import pytest

from cube.channel.messages import ExecSpec
from cube.configdisk import GuestConfig, new_sync_key
from cube.container import ContainerSpec
from cube.guest.assets import ensure_guest
from cube.link import GuestLink, GuestProcess, ProcessExit
from cube.sandbox import Sandbox, SandboxSpec, boot
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from cube.vm.seam import MIB, FileDisk, NbdDisk
from cube.volumes import Mount, Volume, VolumeFile, VolumeKind

SECONDS = 120.0
PATH = "PATH=/bin"


def spec(number: int, script: str, **changes: object) -> ContainerSpec:
    values = {"root_disk": f"root-{number}", "autostart": False, "name": f"c{number}", **changes}
    return ContainerSpec(("sh", "-c", script), (PATH, "A=1"), "", "/", id=number, **values)  # type: ignore[arg-type]  # the fields' own types


async def output(process: GuestProcess, stream: str = "stdout") -> bytes:
    """All of a stream, until its end."""
    source, parts = getattr(process, stream), []
    async with asyncio.timeout(SECONDS):
        while piece := await source.read():
            parts.append(piece)
    return b"".join(parts)


async def until(process: GuestProcess, wanted: bytes) -> bytes:
    """Output up to and with these bytes."""
    seen = b""
    async with asyncio.timeout(SECONDS):
        while wanted not in seen:
            piece = await process.stdout.read()
            assert piece, seen
            seen += piece
    return seen


async def ended(process: GuestProcess) -> ProcessExit:
    return await process.wait(seconds=SECONDS)


async def run(link: GuestLink, container: int, *words: str, **changes: object) -> tuple[int, bytes]:
    """Exit code and output of a program beside a container's own."""
    process = link.execute(ExecSpec(container, words, **changes))  # type: ignore[arg-type]  # the fields' own types
    text = await output(process)
    code = (await ended(process)).code
    link.forget(process)
    return code, text


VOLUMES = (
    Volume("shared", VolumeKind.MEMORY, size_bytes=4 << 20, gid=2000, mode=0o770),
    Volume(
        "settings",
        VolumeKind.FILES,
        files=(
            VolumeFile("key", 0o400, b"top secret", uid=1000),
            VolumeFile("deep/name", 0o644, b"nested"),
        ),
        mode=0o755,
    ),
    Volume("disk", VolumeKind.DISK, disk="vol-1"),
    Volume("broken", VolumeKind.DISK, disk="nowhere"),
)
SERVER = (
    "echo one > /shared/from-1; cat /etc/settings/key; "
    "trap 'echo stopping; exit 3' TERM; while true; do sleep 0.2; done"
)
CONTAINERS = (
    spec(
        1,
        SERVER,
        mounts=(Mount("shared", "/shared"), Mount("settings", "/etc/settings")),
        memory_bytes=64 * MIB,
        cpu_millis=900,
        pids_limit=50,
        discard_after_ms=2000,
        groups=(77,),
    ),
    spec(
        2,
        "cat /other/shared/from-1; echo two > /data/kept; touch /x 2>/dev/null || echo sealed; "
        "echo w > /etc/one 2>/dev/null || echo fixed; cat /etc/one; exit 5",
        mounts=(
            Mount("shared", "/other/shared", read_only=True),
            Mount("disk", "/data", sub_path="inner/part"),
            Mount("settings", "/etc/one", sub_path="deep/name"),
        ),
        read_only_root=True,
        no_new_privileges=True,
    ),
    spec(3, "true", mounts=(Mount("broken", "/broken"),), root_disk="root-1"),
    spec(
        5,
        "dd if=/dev/zero of=/dev/shm/big bs=1M count=60; echo not reached",
        root_disk="root-1",
        memory_bytes=16 * MIB,
    ),
    spec(4, "yes 0123456789abcde", root_disk="root-1", discard_after_ms=300),
)


@contextlib.asynccontextmanager
async def machine(root, cache: Path, disk: Path, key: bytes):
    files = await asyncio.to_thread(ensure_guest, cache)
    driver = QemuDriver(await choose_platform(cache, files))
    config = GuestConfig(CONTAINERS, hostname="pod", volumes=VOLUMES, sync_key=key)
    roots = [NbdDisk(f"root-{number}", root.socket, root.export) for number in (1, 2)]
    disks = (*roots, FileDisk("vol-1", disk, read_only=False))
    async with boot(driver, files, SandboxSpec("pod", config, disks, 256 * MIB, 1)) as sandbox:
        await sandbox.booted()
        yield sandbox


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "volume.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=60)
    return image


async def test_pod_in_a_real_machine(root_export, guest_cache, disk):
    key = new_sync_key()
    async with machine(root_export, guest_cache, disk, key) as sandbox:
        link = sandbox.link
        await link.ping(seconds=SECONDS)
        first = await check_containers(link)
        await check_execs(link)
        await check_terminal(link)
        await check_connections(link)
        await check_stats(link)
        await check_loss(link)
        first, link = await check_adoption(sandbox, first, key)
        first.signal(15)
        assert await until(first, b"stopping\n")
        assert (await ended(first)).code == 3
        link.send(10)  # type: ignore[arg-type]  # SHUTDOWN
        await asyncio.wait_for(sandbox.machine.wait(), SECONDS)
    text = subprocess.run(
        ["debugfs", "-R", "cat /inner/part/kept", str(disk)],
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert text.stdout == b"two\n"


async def check_containers(link: GuestLink) -> GuestProcess:
    """Held containers start when told, one after the other, and again; volumes are shared."""
    first = link.start(1)
    assert await until(first, b"secret") == b"top secret"
    for _ in range(2):
        second = link.start(2)
        assert await output(second) == b"one\nsealed\nfixed\nnested"
        assert (await ended(second)).code == 5
    hungry = await ended(link.start(5))
    assert (hungry.code, hungry.out_of_memory) == (137, True)
    third = link.start(3)
    failed = await ended(third)
    assert failed.code == 125
    assert "nowhere" in failed.problem
    assert not first.exited.done()
    return first


async def check_execs(link: GuestLink) -> None:
    """Beside a container: its namespaces, environment, users, input, codes and signals."""
    script = "echo $A $B; cat /proc/1/comm; hostname; ls -ln /shared; id -G; pwd; exit 9"
    code, text = await run(
        link, 1, "sh", "-c", script,
        environment=("B=2", "A=new"), user="app", working_directory="/home/app",
    )  # fmt: skip
    lines = text.decode().splitlines()
    assert code == 9
    assert lines[0] == "new 2"
    assert lines[2] == "pod"
    assert lines[-2:] == ["1000 44 2000 77", "/home/app"] or "77" in lines[-2]
    assert await run(link, 1, "stat", "-c", "%a %u %g", "/etc/settings/key", "/shared") == (
        0, b"400 1000 0\n2770 0 2000\n",
    )  # fmt: skip
    assert (await run(link, 1, "not-there"))[0] == 127
    assert (await run(link, 2, "true"))[0] == 125  # it is over
    content = bytes(range(256)) * 1000
    process = link.execute(ExecSpec(1, ("cube:busybox", "sha256sum"), stdin=True))
    await process.write_input(content)
    await process.end_input()
    assert (await output(process)).split()[0].decode() == hashlib.sha256(content).hexdigest()
    assert (await ended(process)).code == 0
    sleeper = link.execute(ExecSpec(1, ("sleep", "1000")))
    await asyncio.wait_for(sleeper.started.wait(), SECONDS)
    sleeper.signal(9)
    assert (await ended(sleeper)).code == 137
    code, text = await run(link, 1, "sh", "-c", "sleep 1000 & echo left")
    assert (code, text) == (0, b"left\n")


async def check_terminal(link: GuestLink) -> None:
    """A terminal: sizes, line discipline, merged output, interrupt, its end."""
    script = (
        "trap 'exit 6' INT; echo t-$TERM >&2; busybox stty size; read line; busybox stty size; "
        "echo got-$line; cat"
    )
    shell = link.execute(ExecSpec(1, ("sh", "-c", script), tty=True, stdin=True, rows=30, cols=90))
    assert await until(shell, b"30 90\r\n") == b"t-xterm\r\n30 90\r\n"
    shell.resize(50, 132)
    await shell.write_input(b"typed\n")
    assert await until(shell, b"got-typed\r\n") == b"typed\r\n50 132\r\ngot-typed\r\n"
    await shell.write_input(b"again\n")
    await until(shell, b"again\r\nagain\r\n")
    await shell.write_input(b"\x03")
    assert (await ended(shell)).code == 6
    copy = link.execute(ExecSpec(1, ("cat",), tty=True, stdin=True))
    await copy.write_input(b"x\n")
    await copy.end_input()
    assert await output(copy) == b"x\r\nx\r\n"
    assert (await ended(copy)).code == 0


async def check_connections(link: GuestLink) -> None:
    """TCP from the host into the machine, both ways, and refused."""
    server = link.execute(ExecSpec(1, ("cube:busybox", "nc", "-l", "-p", "8080", "-e", "/bin/cat")))
    await asyncio.wait_for(server.started.wait(), SECONDS)
    for _ in range(100):
        peer = link.connect(8080)
        await asyncio.wait_for(peer.started.wait(), SECONDS)
        if not peer.exited.done():
            break
        assert (await ended(peer)).code == 111
        link.forget(peer)
        await asyncio.sleep(0.2)
    content = bytes(range(256)) * 1024
    writing = asyncio.create_task(peer.write_input(content))
    seen = b""
    while len(seen) < len(content):
        seen += await asyncio.wait_for(peer.stdout.read(), SECONDS)
    assert seen == content
    await asyncio.wait_for(writing, SECONDS)
    await peer.end_input()
    assert (await ended(peer)).code == 0
    refused = link.connect(8081)
    outcome = await ended(refused)
    assert (outcome.code, outcome.problem) == (111, "Connection refused")


async def check_stats(link: GuestLink) -> None:
    """Limits hold, and use is told."""
    code, text = await run(
        link, 1, "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    )
    assert (code, text) == (0, b"%d\n50\n" % (64 * MIB))
    stats = await link.stats(seconds=SECONDS)
    used = stats.containers[1]
    assert used.memory_limit == 64 * MIB
    assert 0 < used.memory_bytes < 64 * MIB
    assert used.cpu_ns > 0
    assert used.pids >= 2
    assert used.read_bytes > 0
    assert 0 < stats.memory_free < stats.memory_total < 256 * MIB


async def check_loss(link: GuestLink) -> None:
    """A reader that stays away does not stop a program for ever; what was dropped is counted."""
    noisy = link.start(4)
    await asyncio.wait_for(noisy.started.wait(), SECONDS)
    before = (await link.stats(seconds=SECONDS)).containers[4].cpu_ns
    async with asyncio.timeout(SECONDS):
        while (await link.stats(seconds=SECONDS)).containers[4].cpu_ns < before + 300_000_000:
            await asyncio.sleep(0.2)
    noisy.signal(9, everything=True)
    async with asyncio.timeout(SECONDS):
        while await noisy.stdout.read():
            pass
    assert (await ended(noisy)).code == 137
    assert noisy.stdout.lost > 0


async def check_adoption(
    sandbox: Sandbox, first: GuestProcess, key: bytes
) -> tuple[GuestProcess, GuestLink]:
    """New hosts take the channel over: in the middle of the old one's frame, and between frames."""
    writer, link = sandbox.machine.writer, sandbox.link
    path = str(sandbox.machine._channel_path)  # type: ignore[attr-defined]  # the driver's own
    for rest in (b"\xff\xff\0\0\x03\0", b""):
        lost = link.execute(ExecSpec(1, ("sleep", "1000")))
        await asyncio.wait_for(lost.started.wait(), SECONDS)
        writer.write(rest)
        await writer.drain()
        writer.close()
        await asyncio.wait_for(asyncio.wait({sandbox._serving}), SECONDS)
        reader, writer = await asyncio.open_unix_connection(path)
        link = GuestLink(reader, writer, sync_key=key)
        sandbox._serving = asyncio.create_task(link.serve())
        await asyncio.wait_for(link.greeted, SECONDS)
        assert set(link.states) == {1, 2, 3, 4, 5}
        assert link.states[2].exited.result().code == 5
        assert "nowhere" in link.states[3].exited.result().problem
        adopted = link.states[1]
        assert adopted.started.is_set()
        assert not adopted.exited.done()
        assert (await run(link, 1, "echo", "again")) == (0, b"again\n")
    sandbox.link = link
    return adopted, link
