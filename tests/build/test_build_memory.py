"""Memory of a build: flat in bytes, linear in entries, far below the limit."""

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from kits.image import write_tars

SCRIPT = """
import asyncio, contextlib, json, sys, threading
from pathlib import Path
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.settings import Settings

async def main():
    root = Path(sys.argv[1])
    where = Settings(state_dir=root / "state", store_url=(root / "store").as_uri())
    async with opened_catalog(where) as (_, catalog):
        request = ImageRequest.parse(sys.argv[2], None, "erofs")
        await build_image(where, catalog, request, lambda _: None)

def high_water(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) << 10

# Resource usage would count what this process's parent held before it became this program.
peaks, done = {}, threading.Event()

def watch():
    while not done.wait(0.02):
        for listed in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError, IndexError):
                for pid in listed.read_text().split():
                    peaks[pid] = high_water(pid)

watcher = threading.Thread(target=watch)
watcher.start()
try:
    asyncio.run(main())
finally:
    done.set()
print(json.dumps([high_water("self"), max(peaks.values())]))
"""


def peak_bytes(root: Path, reference: str) -> int:
    """Peak resident bytes of the builder and its worker together, at most."""
    command = [sys.executable, "-c", SCRIPT, str(root), reference]
    outcome = subprocess.run(command, check=True, capture_output=True, text=True)
    return sum(json.loads(outcome.stdout))


def files_tar(count: int) -> bytes:
    dice = random.Random(1)
    body = dice.randbytes(8192)
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"data/{number // 100:06}/{number:08}.txt")
            member.size = dice.randrange(3000)
            at = dice.randrange(2000)
            tar.addfile(member, io.BytesIO(body[at : at + member.size]))
    return target.getvalue()


def test_memory_is_linear_in_entries(tmp_path: Path) -> None:
    """20,000 files: what 200,000 may take, less the part that does not grow, by ten."""
    reference = write_tars(tmp_path / "image", [files_tar(20_000)], compression="none")
    assert peak_bytes(tmp_path, reference) < 120_000_000


@pytest.mark.soak
def test_memory_of_two_hundred_thousand_files(tmp_path: Path) -> None:
    reference = write_tars(tmp_path / "image", [files_tar(200_000)], compression="none")
    assert peak_bytes(tmp_path, reference) < 300_000_000


def test_memory_is_flat_in_bytes(tmp_path: Path) -> None:
    """Two files of 192 MiB, noise and text, take no more than small ones."""
    target = io.BytesIO()
    noise = random.Random(2).randbytes(64 << 20)
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in (("noise", noise * 3), ("text", b"a line\n" * (192 << 20 >> 3))):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    reference = write_tars(tmp_path / "image", [target.getvalue()], compression="none")
    assert peak_bytes(tmp_path, reference) < 120_000_000
