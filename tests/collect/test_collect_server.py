"""Builders and collectors in processes of their own, against a server nobody here wrote."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.realm import write_images
from kits.s3_servers import ACCESS_KEY, SECRET_KEY, S3Server, rclone_server, scratch_root

from imagecache.composition import opened_catalog
from imagecache.repair.presence import PresenceCheck
from imagecache.settings import Settings
from imagecache.verify import Verifier

PATIENCE = 120  # seconds that any one command may take on a slow machine
COMMAND = str(Path(sys.executable).parent / "cubecache")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with scratch_root() as root, rclone_server(root) as running:
        yield running


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def start(state: Path, url: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [COMMAND, "--json", "--state-dir", str(state), "--store", url, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ,
    )


def examine(url: str, state: Path) -> tuple[dict[str, str], list[str]]:
    """Names by image, and everything that is not whole about any readable image."""

    async def run() -> tuple[dict[str, str], list[str]]:
        where = Settings(state_dir=state, store_url=url)
        async with opened_catalog(where) as (opened, catalog):
            faults: list[str] = []
            images = set()
            check = PresenceCheck(catalog, opened.reader, read_indexes=True)
            async for root in catalog.roots():
                images.add(root.image)
                damage = await check.check(root)
                faults += [f"{each.key}: {each.what}" for each in damage]
                if not damage:
                    verifier = Verifier(
                        catalog,
                        opened.reader,
                        await catalog.block_manifest(root),
                        await catalog.location_table(root),
                    )
                    faults += (await verifier.run(lambda _: None)).damaged
            names = {alias.name: alias.image for alias in await catalog.aliases()}
            faults += [f"{name} names a lost image" for name in names if names[name] not in images]
            return names, faults

    return asyncio.run(run())


def soak(server: S3Server, tmp_path: Path, seconds: float) -> None:
    """Two builders, two collectors, somebody who drops names; looked at all the time."""
    seed = int(os.environ.get("CUBECACHE_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    dice = random.Random(seed)
    url = server.url(f"soak{seed}")
    images = write_images(tmp_path, 3)
    running: dict[str, subprocess.Popen[bytes]] = {}
    counts = dict.fromkeys(("preload", "gc", "rm", "deleted", "killed"), 0)

    def again(role: str) -> None:
        if role.startswith("builder"):
            work = ["preload", dice.choice(images)]
        elif role.startswith("collector"):
            work = ["gc", "--min-age", "2s", "--grace", "2s", "--yes-delete-many"]
        else:
            work = ["rm", dice.choice(images)]
        counts[work[0]] += 1
        running[role] = start(tmp_path / role, url, *work)

    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for role in ("builder1", "builder2", "collector1", "collector2", "owner"):
                process = running.get(role)
                if process is None:
                    if role != "owner" or dice.random() < 0.02:
                        again(role)
                    continue
                if process.poll() is None:
                    if dice.random() < 0.002:
                        process.kill()
                        counts["killed"] += 1
                    continue
                output = process.communicate(timeout=PATIENCE)[0]
                del running[role]
                assert process.returncode in (0, -9, 66, 69, 75), output.decode()
                if role.startswith("collector") and process.returncode == 0:
                    counts["deleted"] += json.loads(output.splitlines()[-1])["deleted"]
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.kill()
            process.communicate(timeout=PATIENCE)
    for image in images:
        done = subprocess.run(
            [COMMAND, "--state-dir", str(tmp_path / "last"), "--store", url, "preload", image],
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr.decode()
    names, faults = examine(url, tmp_path / "look")
    assert not faults, f"seed {seed}"
    assert len(names) == 3
    dropped = start(tmp_path / "last", url, "rm", images[2])
    assert dropped.communicate(timeout=PATIENCE)[0] and not dropped.returncode
    for _ in range(5):
        time.sleep(2.1)
        gc = start(
            tmp_path / "last", url, "gc", "--min-age", "2s", "--grace", "2s", "--yes-delete-many"
        )
        output = gc.communicate(timeout=PATIENCE)[0]
        assert gc.returncode == 0, output.decode()
        counts["deleted"] += json.loads(output.splitlines()[-1])["deleted"]
    names, faults = examine(url, tmp_path / "look")
    assert not faults, f"seed {seed}"
    assert len(names) == 2
    print(counts)
    assert counts["deleted"]


def test_builders_and_collectors_on_one_server(
    server: S3Server, tmp_path: Path, keys: None
) -> None:
    """Some seconds of `rclone serve s3`: no object of a readable image is lost."""
    soak(server, tmp_path, 10)


@pytest.mark.soak
def test_builders_and_collectors_on_one_server_soak(
    server: S3Server, tmp_path: Path, keys: None
) -> None:
    """CUBECACHE_SOAK_MINUTES (20) of the same: 0 lost objects."""
    soak(server, tmp_path, 60 * float(os.environ.get("CUBECACHE_SOAK_MINUTES", "20")))
