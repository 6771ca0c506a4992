"""Several processes on one directory store, killed at random moments."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imagecache.store.local import LocalStore

WRITER = """
import asyncio, hashlib, random, sys
from pathlib import Path
from imagecache.store.local import LocalStore

async def main(root, seed, me):
    dice = random.Random(seed)
    store = LocalStore(Path(root))
    print("ready", flush=True)
    while True:
        number = dice.randrange(400)
        # Content-addressed, like packs: whoever writes a key writes these bytes.
        body = random.Random(number).randbytes(1 + number * 400)
        key = f"r/packs/{number % 5}/{hashlib.sha256(body).hexdigest()}"
        await store.put(key, body, only_if_absent=dice.random() < 0.5)
        print("done", key, flush=True)
        claim = f"r/claims/{dice.randrange(10**6)}"
        if await store.put(claim, f"{me}".encode(), only_if_absent=True):
            print("won", claim, flush=True)
        if dice.random() < 0.1:
            await store.put("r/alias", (b"%d" % number) * 1000)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
"""


async def check(root: Path, acknowledged: set[str], claims: dict[str, str]) -> int:
    store = LocalStore(root, temp_age_s=0.0)
    found = {}
    async for stat in store.list(""):
        body = await store.get(stat.key, limit=1 << 20)
        assert len(body) == stat.size
        if stat.key.startswith("r/packs/"):
            assert hashlib.sha256(body).hexdigest() == stat.key.rpartition("/")[2]
        elif stat.key == "r/alias":
            assert len(body) % 1000 == 0 and body == body[: len(body) // 1000] * 1000
        found[stat.key] = body
    assert acknowledged <= found.keys()
    for key, owner in claims.items():
        assert found[key] == owner.encode()
    assert list((root / ".tmp").iterdir()) == []
    await store.close()
    return len(found)


async def killed_writers(root: Path, rounds: int, seed: int) -> None:
    dice = random.Random(seed)
    acknowledged: set[str] = set()
    claims: dict[str, str] = {}
    for turn in range(rounds):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, root, str(dice.random())[2:], f"{turn}-{number}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(3)
        ]
        watchdog = threading.Timer(60, lambda started: [x.kill() for x in started], [processes])
        watchdog.start()
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        watchdog.cancel()
        time.sleep(dice.random() * 0.3)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for number, process in enumerate(processes):
            lines = process.communicate(timeout=60)[0].split("\n")[:-1]  # the last may be torn
            acknowledged.update(line[5:] for line in lines if line.startswith("done "))
            for line in lines:
                if line.startswith("won "):
                    assert line[4:] not in claims, "two writers won one claim"
                    claims[line[4:]] = f"{turn}-{number}"
    assert acknowledged
    print(f"{await check(root, acknowledged, claims)} objects, {len(claims)} claims")


async def test_killed_writers_leave_whole_objects(tmp_path: Path) -> None:
    """H2 for the store: what was acknowledged is there, whole; nothing else is seen."""
    seed = int(os.environ.get("STORE_SEED", random.randrange(1 << 30)))
    print(f"STORE_SEED={seed}")
    await killed_writers(tmp_path, rounds=4, seed=seed)


@pytest.mark.soak
async def test_killed_writers_many_times(tmp_path: Path) -> None:
    """H2 for the store, 100 rounds of three writers."""
    seed = int(os.environ.get("STORE_SEED", random.randrange(1 << 30)))
    print(f"STORE_SEED={seed}")
    await killed_writers(tmp_path, rounds=100, seed=seed)
