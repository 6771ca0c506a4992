"""Runs inside a microVM as root: attaches the guest's own kernel to an nbdserver in the same guest.

It prints "ok STEP" for each step that held, and ends with a traceback at the first that did not.
Arguments: how many operations the file system exerciser does, how often the server is killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from nbdserver.attach import adopt, attach, attached_devices, detach_device
from nbdserver.uri import NbdUri

WORK = Path("/mnt")
SOCKET = WORK / "nbd.sock"
BASE = WORK / "base"
MOUNT = WORK / "files"
SIZE = 32 << 20
URI = NbdUri("disk", unix=SOCKET)
COMPLAINTS = ("I/O error", "EXT4-fs error", "EXT4-fs warning")


class Server:
    """An overlay over the base file, served by a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "nbdserver.cli", "--unix", str(SOCKET), "--name", "disk"]
        self.process = subprocess.Popen([*command, "--overlay", str(WORK / "overlay"), str(BASE)])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


async def started() -> Server:
    SOCKET.unlink(missing_ok=True)
    server = Server()
    end = time.monotonic() + 120
    while not SOCKET.exists():
        assert server.process.poll() is None and time.monotonic() < end, "the server did not start"
        await asyncio.sleep(0.05)
    return server


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{time.monotonic():.1f} s", *command, flush=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def complaints() -> list[str]:
    """What the kernel's log says of failed I/O so far."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    lines = []
    try:
        while True:
            lines.append(os.read(log, 8192).decode(errors="replace"))
    except BlockingIOError:
        pass
    finally:
        os.close(log)
    return [line for line in lines if any(words in line for words in COMPLAINTS)]


class Exerciser:
    """Creates, rewrites, extends, cuts, renames, links and removes files; knows what they hold."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.expected: dict[str, bytes] = {}
        self.made = 0

    def step(self) -> None:
        names = sorted(self.expected)
        action = self.random.randrange(8) if len(names) > 4 else 0
        name = self.random.choice(names) if names else ""
        path = self.folder / name
        if action <= 1 and len(names) < 150:
            self.made += 1
            name = f"{self.made % 7}/{self.made}"
            (self.folder / name).parent.mkdir(exist_ok=True)
            self.expected[name] = self.random.randbytes(self.random.randrange(60_000))
            (self.folder / name).write_bytes(self.expected[name])
        elif action <= 3:
            at = self.random.randrange(len(self.expected[name]) + 1)
            piece = self.random.randbytes(self.random.randrange(1, 20_000))
            with path.open("r+b") as file:
                file.seek(at)
                file.write(piece)
                if self.random.random() < 0.3:
                    file.flush()
                    os.fsync(file.fileno())
            held = self.expected[name]
            self.expected[name] = held[:at] + piece + held[at + len(piece) :]
        elif action == 4:
            length = self.random.randrange(80_000)
            os.truncate(path, length)
            self.expected[name] = self.expected[name][:length].ljust(length, b"\0")
        elif action == 5:
            self.made += 1
            path.rename(self.folder / f"moved-{self.made}")
            self.expected[f"moved-{self.made}"] = self.expected.pop(name)
        elif action == 6:
            path.unlink()
            del self.expected[name]
        else:
            os.sync()

    def verify(self) -> int:
        """Reads all again from the device; how many files there were."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        found = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        assert found.keys() == self.expected.keys()
        for name, content in self.expected.items():
            assert found[name] == content, f"{name} differs"
        return len(found)


def exercise(exerciser: Exerciser, count: int) -> None:
    for _ in range(count):
        exerciser.step()


def device_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def attach_and_read() -> None:
    attachment = await attach(URI, connections=4, identifier="test/read", dead_seconds=120)
    path = attachment.device.path
    assert await asyncio.to_thread(device_digest, path) == device_digest(BASE)
    found = await attached_devices()
    assert [(item.path, item.identifier) for item in found] == [(path, "test/read")]
    await attachment.detach()
    attachment.close()
    assert await attached_devices() == []
    assert Path(f"/sys/block/{path.name}/size").read_text().strip() == "0"
    print("ok attach", flush=True)


async def file_system(server: Server, steps: int, kills: int) -> Server:
    attachment = await attach(URI, connections=4, identifier="test/files", dead_seconds=120)
    keeper = asyncio.create_task(attachment.keep())
    path = str(attachment.device.path)
    await asyncio.to_thread(run, "mkfs.ext4", "-q", path)
    await asyncio.to_thread(run, "mount", path, str(MOUNT))
    files = Exerciser(MOUNT / "work", 1)
    files.folder.mkdir()
    await asyncio.to_thread(exercise, files, steps)
    count = await asyncio.to_thread(files.verify)
    print(f"ok exercise {count} files", flush=True)
    for _ in range(kills):
        busy = asyncio.create_task(asyncio.to_thread(exercise, files, steps))
        await asyncio.sleep(files.random.random() * 0.5)
        server.kill()
        await asyncio.sleep(0.3)
        server = await started()
        await busy
        await asyncio.to_thread(files.verify)
    assert not keeper.done()
    assert complaints() == [], complaints()
    print(f"ok killed {kills} times", flush=True)
    await asyncio.to_thread(run, "umount", str(MOUNT))
    keeper.cancel()
    await attachment.detach()
    attachment.close()
    await asyncio.to_thread(peer, files)
    print("ok peer", flush=True)
    return server


def peer(files: Exerciser) -> None:
    """nbd-client attaches what the exerciser left; the file system is clean and whole."""
    run("nbd-client", "-unix", str(SOCKET), "/dev/nbd7", "-N", "disk", "-C", "4")
    run("e2fsck", "-f", "-n", "/dev/nbd7")
    run("mount", "/dev/nbd7", str(MOUNT))
    exercise(files, 20)
    files.verify()
    run("umount", str(MOUNT))
    run("nbd-client", "-d", "/dev/nbd7")


async def stale(server: Server) -> Server:
    """A device whose process is gone is found by its mark, and detached, or adopted."""
    gone = """
import asyncio
from nbdserver.attach import attach
from kits.nbd_kernel_guest import URI
asyncio.run(attach(URI, identifier="test/stale", dead_seconds=120))
"""
    for take in (detach_device, None):
        await asyncio.to_thread(run, sys.executable, "-c", gone)
        (device,) = await attached_devices()
        assert device.identifier == "test/stale"
        if take is not None:
            await take(device.index)
            assert await attached_devices() == []
            print("ok reclaimed", flush=True)
            continue
        server.kill()
        reader = asyncio.create_task(asyncio.to_thread(device_digest, device.path))
        await asyncio.sleep(0.3)
        server = await started()
        attachment = await adopt(URI, device)
        with_files = await asyncio.wait_for(reader, 300)
        assert with_files == await asyncio.to_thread(device_digest, device.path)
        await attachment.detach()
        attachment.close()
        print("ok adopted", flush=True)
    assert complaints() == [], complaints()
    return server


async def main() -> None:
    steps, kills = int(sys.argv[1]), int(sys.argv[2])
    run("mount", "-t", "devtmpfs", "devtmpfs", "/dev")
    run("mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(WORK))
    MOUNT.mkdir()
    block = random.Random(0).randbytes(1 << 16)
    with BASE.open("wb") as file:
        for number in range(SIZE // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
    server = await started()
    await attach_and_read()
    server = await file_system(server, steps, kills)
    server = await stale(server)
    server.kill()
    print("ok end", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
