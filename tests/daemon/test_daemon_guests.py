"""Real microVMs that read and write while their daemon is upgraded and killed."""

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory
from kits.image import write_image
from kits.upgrading import ServedHost

from cube.container import ImageDefaults, Overrides, compose
from cube.guest.assets import default_cache, ensure_guest
from cube.link import GuestProcess
from cube.run import ROOT_SERIAL, guest_config
from cube.sandbox import SandboxSpec, boot
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from cube.vm.seam import MIB, NbdDisk

APPLETS = "sh cat dd echo rm sha256sum sync test true".split()
# Reads everything of the image, and what it wrote, from the disk and not from memory.
SCRIPT = r"""
exec 3<&0
(read end <&3; : > /tmp/stop) &
want=$(cat /data/* | sha256sum)
i=0
while [ ! -e /tmp/stop ]; do
  f=/written-$((i % 4))
  dd if=/dev/urandom of=$f bs=64k count=8 2>/dev/null || echo FAILED write
  sync || echo FAILED sync
  a=$(cat $f | sha256sum) || echo FAILED read
  echo 3 > /proc/sys/vm/drop_caches
  b=$(cat $f | sha256sum) || echo FAILED read
  [ "$a" = "$b" ] || echo FAILED own
  c=$(cat /data/* | sha256sum) || echo FAILED read
  [ "$c" = "$want" ] || echo FAILED image
  i=$((i + 1))
  echo round $i
done
echo end
"""


@pytest.fixture
def image(tmp_path: Path) -> str:
    """Busybox, and data to read."""
    busybox = Entry("bin/busybox", mode=0o755, content=Path("/bin/busybox").read_bytes())
    links = [Entry(f"bin/{name}", "symlink", 0o777, target="busybox") for name in APPLETS]
    rng = random.Random(1)
    data = [Entry(f"data/{n}", content=rng.randbytes(1 << 20)) for n in range(6)]
    return write_image(
        tmp_path / "image",
        [
            [directory("bin"), busybox, *links],
            [directory(name) for name in ("data", "proc", "sys", "dev", "tmp", "etc")],
            data,
        ],
    )


class Guest:
    """One microVM whose root is a writable export; what it printed, and its console."""

    def __init__(self, socket: Path, export: str) -> None:
        self.socket, self.export = socket, export
        self.stop = asyncio.Event()
        self.printed = ""
        self.console: list[str] = []
        self.code: int | None = None

    async def run(self, cache: Path) -> None:
        files = await asyncio.to_thread(ensure_guest, cache, kernel=None, initrd=None)
        platform = await choose_platform(cache, files)
        container = compose(
            ImageDefaults(), Overrides(command=("/bin/sh", "-c", SCRIPT)), hostname="guest"
        )
        spec = SandboxSpec(
            name="guest",
            config=guest_config(
                replace(container, root_writable=True), "ext4", "guest", wants_stdin=True
            ),
            disks=(NbdDisk(ROOT_SERIAL, self.socket, self.export, read_only=False),),
            memory_bytes=256 * MIB,
            cpus=1,
        )
        async with asyncio.timeout(3000), boot(QemuDriver(platform), files, spec) as sandbox:
            process = sandbox.link.processes[container.id]
            await sandbox.booted()
            ending = asyncio.create_task(self._end(process))
            while piece := await process.stdout.read():
                self.printed += piece.decode()
            await ending
            self.code = (await sandbox.exit_of(process, seconds=120)).code
            self.console = sandbox.machine.last_words()

    async def _end(self, process: GuestProcess) -> None:
        await self.stop.wait()
        await process.end_input()

    async def goes_on(self) -> None:
        """Returns when it has done another round from its begin to its end."""
        before = self.round
        async with asyncio.timeout(600):
            while self.round < before + 2:
                await asyncio.sleep(0.02)

    @property
    def round(self) -> int:
        return self.printed.count("round ")


@pytest.mark.parametrize(
    ("guests", "events"),
    [
        (1, ["upgrade", "kill"]),
        pytest.param(2, ["upgrade", "kill", "upgrade"] * 10, marks=pytest.mark.soak),
    ],
)
async def test_guests_notice_neither_upgrades_nor_kills(
    tmp_path: Path, image: str, guests: int, events: list[str]
) -> None:
    """0 I/O errors in guests that read their image and read back what they wrote."""
    seed = int(os.environ.get("CUBECACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    with ServedHost(tmp_path / "state") as host:
        await asyncio.to_thread(host.serve)
        preload = ("preload", "--fs", "ext4", "--free", "64MiB", image)
        await asyncio.to_thread(host.cubecache, *preload)
        running: list[Guest] = []
        for number in range(guests):
            fs = f"ext4:free={64 << 20}"
            name = f"guest-{number}"
            host.export(image, fs=fs, name=name, writable=True, fill="none")
            running.append(Guest(host.state / "nbd.sock", name))
        cache = default_cache(os.environ)
        tasks = [asyncio.create_task(guest.run(cache)) for guest in running]
        try:
            for event in events:
                await progress(running, tasks)
                await asyncio.sleep(rng.random() * 0.5)
                if event == "upgrade":
                    await asyncio.to_thread(host.upgrade)
                else:
                    await asyncio.to_thread(host.kill)
                    await asyncio.sleep(rng.random() * 0.5)
                    await asyncio.to_thread(host.serve)
            await progress(running, tasks)
            for guest in running:
                guest.stop.set()
            async with asyncio.timeout(600):
                await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for guest in running:
            assert "FAILED" not in guest.printed, guest.printed
            assert guest.printed.endswith("end\n"), (guest.printed, guest.console)
            assert guest.code == 0
            assert not any("error" in line.lower() for line in guest.console), guest.console
        await asyncio.to_thread(host.stop)


async def progress(guests: list[Guest], tasks: list[asyncio.Task[None]]) -> None:
    """Returns when every guest has gone on; fails with what ended one."""
    going = [asyncio.create_task(guest.goes_on()) for guest in guests]
    try:
        for task in going:
            await asyncio.wait({task, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for guest, run in zip(guests, tasks, strict=True):
                assert not run.done(), (run, guest.printed)
            await task
    finally:
        for task in going:
            task.cancel()
