"""Machines that fail: typed errors with the last words, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cube.configdisk import GuestConfig
from cube.container import ContainerSpec, Overrides
from cube.errors import BootFailed, MachineFailed
from cube.guest.assets import ensure_guest
from cube.run import RootExport, RunSettings, Streams, guest_config, run_image
from cube.sandbox import SandboxSpec, boot
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from cube.vm.seam import MIB, MachineSpec, NbdDisk
from imagecache.errors import NotFound

SLEEPER = ContainerSpec(("sh", "-c", "echo up; sleep 1000"), ("PATH=/bin",), "", "/")


def children(owner: int) -> set[int]:
    """Processes whose parent is this one."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == owner:
                found.add(int(status.parent.name))
    return found


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Children, directories and descriptors are the same after the test as before."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    before, descriptors = children(os.getpid()), len(os.listdir("/proc/self/fd"))
    yield
    assert children(os.getpid()) <= before
    assert not list(directory.iterdir())
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@contextlib.asynccontextmanager
async def booted(root: RootExport, cache: Path, config: GuestConfig):
    files = await asyncio.to_thread(ensure_guest, cache)
    driver = QemuDriver(await choose_platform(cache, files))
    spec = SandboxSpec("test", config, (NbdDisk("root-1", root.socket, root.export),), 256 * MIB, 1)
    async with boot(driver, files, spec) as sandbox:
        yield sandbox


async def test_killed_machine_is_a_typed_error(root_export, guest_cache, nothing_left):
    async with booted(root_export, guest_cache, guest_config(SLEEPER, "erofs", "t")) as sandbox:
        await sandbox.booted()
        process = sandbox.link.processes[1]
        assert await process.stdout.read() == b"up\n"
        os.kill(sandbox.machine.process_id, signal.SIGKILL)
        with pytest.raises(MachineFailed, match="killed by signal 9 while its program ran"):
            await sandbox.exit_of(process)
        assert await process.stdout.read() == b""


async def test_cancelled_run_leaves_nothing(root_export, guest_cache, nothing_left):
    run = asyncio.create_task(
        run_image(
            root_export,
            Overrides(command=("sleep", "1000")),
            RunSettings(cache=guest_cache),
            Streams(),
        )
    )
    await asyncio.sleep(1.5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_disk_without_the_promised_file_system(root_export, guest_cache, nothing_left):
    config = guest_config(SLEEPER, "ext4", "t")
    async with booted(root_export, guest_cache, config) as sandbox:
        with pytest.raises(BootFailed, match="cannot mount the root disk as ext4") as caught:
            await sandbox.exit_of(sandbox.link.processes[1], seconds=200)
    assert any("cube-agent: cannot mount" in line for line in caught.value.console)


async def test_missing_export_names_the_reason(root_export, guest_cache, tmp_path, nothing_left):
    root = RootExport(tmp_path / "no.sock", "", "erofs", root_export.defaults)
    with pytest.raises(BootFailed, match="ended with status 1") as caught:
        await run_image(root, Overrides(), RunSettings(cache=guest_cache), Streams())
    assert any("no.sock" in line for line in caught.value.console)


async def test_initramfs_that_is_none(root_export, guest_cache, tmp_path, nothing_left):
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    await choose_platform(guest_cache, files)
    junk = tmp_path / "junk.cpio"
    junk.write_bytes(b"not an archive" * 1000)
    driver = QemuDriver(await choose_platform(guest_cache, files))
    broken = type(files)(files.kernel, junk, files.release, files.tsc_khz)
    spec = SandboxSpec("t", guest_config(SLEEPER, "erofs", "t"), (), 256 * MIB, 1)
    async with boot(driver, broken, spec) as sandbox:
        with pytest.raises(BootFailed, match="before it had booted") as caught:
            await sandbox.booted()
    assert any("panic" in line for line in caught.value.console)


@pytest.mark.parametrize("which", ["kernel", "initrd"])
async def test_missing_guest_file_is_not_found(root_export, guest_cache, tmp_path, which):
    settings = RunSettings(cache=guest_cache, **{which: tmp_path / "nothing"})
    with pytest.raises(NotFound, match="nothing does not exist"):
        await run_image(root_export, Overrides(), settings, Streams())


async def test_killed_owner_takes_its_machine_along(
    root_export, guest_cache, tmp_path, monkeypatch
):
    script = tmp_path / "owner.py"
    script.write_text(
        "import asyncio\n"
        "from pathlib import Path\n"
        "from cube.container import ImageDefaults, Overrides\n"
        "from cube.run import RootExport, RunSettings, Streams, run_image\n"
        f"root = RootExport(Path({str(root_export.socket)!r}), '', 'erofs', ImageDefaults())\n"
        "asyncio.run(run_image(root, Overrides(command=('sh', '-c', 'echo up; sleep 1000')),\n"
        f"    RunSettings(cache=Path({str(guest_cache)!r})), Streams()))\n"
    )
    owner = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    machines = children(owner.pid)
    assert machines
    owner.kill()
    owner.wait()
    owner.stdout.close()
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in machines):
            break
        await asyncio.sleep(0.05)
    assert not [pid for pid in machines if Path(f"/proc/{pid}").exists()]
    # Its directory stays behind, until the next machine sweeps up.
    assert list(tmp_path.glob("cubecache-vm-*"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with booted(root_export, guest_cache, guest_config(SLEEPER, "erofs", "t")):
        assert len(list(tmp_path.glob("cubecache-vm-*"))) == 1


async def test_interrupt_reaches_the_program_and_its_status_counts(
    root_export, guest_cache, nothing_left
):
    script = 'trap "echo caught; exit 9" INT; echo ready; while :; do sleep 0.1; done'
    read_end, write_end = os.pipe()
    run = asyncio.create_task(
        run_image(
            root_export,
            Overrides(command=("sh", "-c", script)),
            RunSettings(cache=guest_cache),
            Streams(stdout=write_end),
        )
    )
    # Closed when the run ends: a machine that does not boot is its error here, not a wait.
    run.add_done_callback(lambda _: os.close(write_end))
    said = await asyncio.to_thread(os.read, read_end, 100)
    if said != b"ready\n":
        pytest.fail(f"{said!r}, {await run}")
    os.kill(os.getpid(), signal.SIGINT)
    outcome = await run
    assert await asyncio.to_thread(os.read, read_end, 100) == b"caught\n"
    assert (outcome.exit.code, outcome.exit.signal) == (9, 0)
    os.close(read_end)


async def test_interrupt_while_booting_ends_the_machine(root_export, guest_cache, nothing_left):
    run = asyncio.create_task(
        run_image(root_export, Overrides(), RunSettings(cache=guest_cache), Streams())
    )
    for _ in range(100):
        await asyncio.sleep(0.05)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
            break
    os.kill(os.getpid(), signal.SIGTERM)
    outcome = await run
    assert (outcome.exit.code, outcome.exit.signal) == (143, 15)


async def test_closed_stdout_ends_the_run(root_export, guest_cache, nothing_left):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(BrokenPipeError):
        await run_image(
            root_export,
            Overrides(command=("yes",)),
            RunSettings(cache=guest_cache),
            Streams(stdout=write_end),
        )
    os.close(write_end)


async def test_directory_that_is_gone(root_export, guest_cache, tmp_path):
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    driver = QemuDriver(await choose_platform(guest_cache, files))
    gone = tmp_path / "gone"
    with pytest.raises(BootFailed, match=r"channel .* cannot be made"):
        await driver.start(MachineSpec("t", files.kernel, files.initrd, (), gone))
