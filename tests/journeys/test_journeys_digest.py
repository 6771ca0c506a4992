"""One digest whatever the environment: the number that an image has, on every host, for ever."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imagemaker.entries import Entry, access_list, capability, directory, opaque, whiteout
from kits.image import write_image
from testbed.otherpython import OtherPython

BUILD = """
import asyncio, json, os, sys
from pathlib import Path
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.sections import BuildSection
from imagecache.settings import Settings

job = json.loads(sys.argv[1])
os.umask(job["umask"])
where = Settings(
    state_dir=Path(job["state"]),
    store_url=Path(job["store"]).as_uri(),
    build=BuildSection(level=job["level"], threads=job["threads"]),
)

async def run():
    async with opened_catalog(where) as (_, catalog):
        for reference in job["references"]:
            request = ImageRequest.parse(reference, None, job["face"])
            built = await build_image(where, catalog, request, lambda _: None)
        print(json.dumps([sys.version_info[:2], built.block_image, built.new_chunks]))

asyncio.run(run())
"""
GOLDEN = {
    "erofs": "50278199545a00e7568c0c82e89ac1237e5540cd4b322ca57a76066f3313ceaa",
    "ext4:free=8388608": "914d3619b03cb8190b90e701d77abf9d0bf27df959d4b51b4b3e7df65660ff37",
}
"""A change of one of these is a new format version: every stored image gets another name."""


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def layers(extra: bytes = b"") -> list[list[Entry]]:
    """Everything that a file can have, over three layers; `extra` makes another version of it."""
    base = [
        directory("usr"),
        directory("usr/lib", 0o755, uid=7),
        directory("var"),
        directory("run"),
    ]
    base += [Entry(f"usr/lib/f{n:03d}", content=noise(n, 97 * n)) for n in range(200)]
    base += [
        Entry("usr/lib/large", content=noise(1000, 1_500_000) + bytes(900_000) + noise(1001, 77)),
        Entry("usr/lib/again", "hardlink", target="usr/lib/large"),
        Entry("usr/lib/odd\udcff", mode=0o4755, content=b"x", mtime_ns=-1_500_000_001),
        Entry("usr/lib/link", "symlink", target="../lib/f001"),
        Entry("var/null", "char", 0o666, device=(1, 3)),
        Entry("var/pipe", "fifo", 0o600),
        Entry("run/gone", content=b"gone"),
    ]
    upper = [
        Entry("usr/lib/f007", content=b"seven" + extra, xattrs={"user.k": b"\x00v"}),
        Entry("usr/lib/cap", content=b"c", xattrs={"security.capability": capability(10)}),
        Entry("usr/lib/acl", xattrs={"system.posix_acl_access": access_list(7, 5, 4, {1000: 6})}),
        whiteout("usr/lib/f009"),
        opaque("run"),
    ]
    top = [Entry(f"app/{n}", content=noise(5000 + n, 40_000)) for n in range(30)]
    return [base, upper, [directory("app"), *top]]


@functools.cache
def other_python() -> OtherPython:
    return OtherPython()


class Builds:
    """Builds one image in environments of any kind, each in a state directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = write_image(folder / "image", layers())
        self.before = write_image(folder / "before", layers(b" as it was"))
        self.stranger = write_image(folder / "stranger", [[Entry("a", content=noise(9, 300_000))]])
        self._count = 0

    def build(self, dice: random.Random, face: str, python: str) -> str:
        """The block image's digest, of a build in an environment that the dice choose."""
        self._count += 1
        place = self.folder / f"build-{self._count}"
        place.mkdir()
        past = [[], [self.stranger], [self.before], [self.stranger, self.before]]
        job = {
            "state": str(place / "state"),
            "store": str(place / "store"),
            "umask": dice.choice([0o000, 0o022, 0o077]),
            "level": dice.choice([1, 3, 9]),
            "threads": dice.choice([1, 2, 8]),
            "face": face,
            "references": [*dice.choice(past), self.image],
        }
        environment = {
            "PATH": os.environ["PATH"],
            "TZ": dice.choice(["UTC", "Pacific/Kiritimati", "America/St_Johns"]),
            "LC_ALL": dice.choice(["C", "C.UTF-8", "tr_TR.UTF-8", "POSIX"]),
            "PYTHONHASHSEED": str(dice.randrange(1 << 32)),
        }
        return self._run(job, environment, python, place)

    def _run(self, job: object, environment: dict[str, str], python: str, place: Path) -> str:
        arguments = ["-c", BUILD, json.dumps(job)]
        if python == "own":
            command = [sys.executable, *arguments]
        else:
            other = other_python()
            command = other.command(arguments, [self.folder])
            environment = environment | other.environment()
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, (job, environment, done.stderr[-3000:])
        version, digest, _ = json.loads(done.stdout)
        assert (tuple(version) == sys.version_info[:2]) is (python == "own")
        shutil.rmtree(place)
        return str(digest)


@pytest.fixture
def builds(tmp_path: Path) -> Builds:
    return Builds(tmp_path)


@pytest.mark.parametrize("face", GOLDEN)
def test_digest_of_an_image_with_everything_is_golden(builds: Builds, face: str) -> None:
    assert builds.build(random.Random(1), face, "own") == GOLDEN[face]


@pytest.mark.soak
def test_hundred_builds_in_varied_environments_are_one(builds: Builds) -> None:
    """Time zones, locales, umasks, hash seeds, threads, levels, pasts, faces and two Pythons."""
    for number in range(100):
        face = list(GOLDEN)[number % 2]
        python = "other" if number % 4 < 2 else "own"
        found = builds.build(random.Random(number), face, python)
        assert found == GOLDEN[face], f"build {number} by {python} Python"
