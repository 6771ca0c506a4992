"""Kernel attach in a microVM with Debian's kernel: the guest's nbd devices over a server inside.

Nothing here waits for ever: programs have deadlines, `run_image` ends a machine that never boots or
whose program does not end, and what of that would hang itself is cut by a deadline around it.
"""

import asyncio
import compileall
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from imagemaker.distribution import root_tar
from imagemaker.recipes import RECIPES, Packages
from kits.image import CACHE, recipe_layout
from kits.vm_image import NbdServer, make_erofs

from cube.container import ALL_CAPABILITIES, ImageDefaults, Overrides
from cube.errors import Overdue
from cube.guest.assets import default_cache
from cube.run import RootExport, RunSettings, Streams, run_image

PROJECT = Path(__file__).parents[2]
DEADLINE = 300  # seconds, for what takes a few


@pytest.fixture(scope="module")
def guest_root(tmp_path_factory):
    """The recipe's root with nbdserver and the guest's program in it, as EROFS over NBD."""
    folder = tmp_path_factory.mktemp("nbd-guest")
    recipe_layout("nbd-guest")  # made once per checkout, and its root with it
    layers = RECIPES["nbd-guest"].layers
    names = [name for layer in layers if isinstance(layer, Packages) for name in layer.names]
    tree = folder / "tree"
    tree.mkdir()
    unpack = ["tar", "-xf", root_tar(CACHE, names), "-C", tree]
    subprocess.run(unpack, check=True, timeout=DEADLINE)
    library = tree / "opt/tested"
    shutil.copytree(PROJECT / "nbdserver", library / "nbdserver")
    (library / "kits").mkdir()
    shutil.copy(PROJECT / "tests/kits/nbd_kernel_guest.py", library / "kits")
    # An emulated processor compiles slowly.
    compileall.compile_dir(library, quiet=1, stripdir=tree)
    image = make_erofs(tree, folder / "root.erofs")
    shutil.rmtree(tree)
    server = NbdServer(image, folder / "root.sock")
    yield RootExport(server.socket, "", "erofs", ImageDefaults())
    server.stop()


async def run_in_guest(root, folder, steps, kills, seconds):
    out = folder / "out"
    overrides = Overrides(
        command=("python3", "-m", "kits.nbd_kernel_guest", str(steps), str(kills)),
        environment={"PYTHONPATH": "/opt/tested"},
    )
    settings = RunSettings(
        cache=default_cache(os.environ),
        memory_bytes=768 << 20,
        seconds=seconds,
        modules=("nbd", "ext4"),
        capabilities=ALL_CAPABILITIES,
    )
    with out.open("wb") as file, (folder / "err").open("wb") as errors:
        async with asyncio.timeout(seconds + DEADLINE):
            streams = Streams(file.fileno(), errors.fileno())
            outcome = await run_image(root, overrides, settings, streams)
    lines = out.read_text().splitlines()
    assert outcome.exit.code == 0, (folder / "err").read_text() + "\n".join(lines)
    return [line.split()[1] for line in lines if line.startswith("ok ")]


STEPS = ["attach", "exercise", "killed", "peer", "reclaimed", "adopted", "end"]


async def test_guest_that_never_boots(guest_root, tmp_path):
    """The deadline counts from the machine's start, and nothing of the machine is left after it."""
    with pytest.raises(Overdue):
        await run_in_guest(guest_root, tmp_path, 20, 1, 0.3)
    assert machines_of(os.getpid()) == []


def machines_of(owner):
    """QEMU processes below a process."""
    found = []
    for task in Path(f"/proc/{owner}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "qemu" in Path(f"/proc/{child}/comm").read_text():
                found.append(child)
    return found


async def test_kernel_attach(guest_root, tmp_path):
    """Attach with 4 connections, ext4, kill -9 of the server, nbd-client, reclaim, adopt."""
    assert await run_in_guest(guest_root, tmp_path, 20, 1, 900) == STEPS


@pytest.mark.soak
async def test_kernel_attach_through_many_kills(guest_root, tmp_path):
    """The same with 20 kills and more files."""
    assert await run_in_guest(guest_root, tmp_path, 60, 20, 2800) == STEPS
