"""gc, pin, scrub, repair, stats and verify --fast as an operator runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kits.realm import write_images

COMMAND = str(Path(sys.executable).parent / "cubecache")


def test_a_damaged_store_is_found_repaired_and_collected(tmp_path: Path) -> None:
    """One realm's life: damage, repair, a pin that holds, a dry run, a guard, the end."""
    one, two = write_images(tmp_path)

    def run(*arguments: str, code: int = 0) -> Any:
        done = subprocess.run(
            [COMMAND, "--json", "--state-dir", str(tmp_path / "state"), *arguments],
            capture_output=True,
            check=False,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    def gc(*arguments: str) -> Any:
        return run("gc", "--min-age", "0", "--grace", "0", *arguments)

    run("preload", one)
    run("preload", two)
    assert run("verify", "--fast", one)["damage"] == []
    packs = sorted((tmp_path / "state/store/v1/default/packs/00000001").iterdir())
    raw = bytearray(packs[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    packs[0].chmod(0o600)
    packs[0].write_bytes(raw)
    packs[-1].unlink()
    assert len(run("scrub", code=74)["damage"]) == 2
    assert run("repair")["failed"] == {}
    assert run("scrub", "--from-start")["damage"] == []
    run("verify", one)
    run("verify", two)
    run("pin", two, "--ttl", "1h")
    run("rm", two)
    assert gc("--dry-run")["doomed"] == []
    gc("--yes-delete-many")
    (pin,) = run("pin", "--list")
    assert len(run("images")) == 2
    run("pin", "--remove", pin["image"])
    for _ in range(4):
        listed = gc("--dry-run")["doomed"]
        assert gc("--yes-delete-many")["doomed"] == listed
    assert len(run("images")) == 1
    assert run("stats")["garbage_pack_bytes"] == 0
    run("verify", one)


def test_mostly_dead_packs_give_way_by_command(tmp_path: Path) -> None:
    """`repack`: what a dropped image leaves in packs that another one shares."""
    one, two = write_images(tmp_path)

    def run(*arguments: str, code: int = 0) -> Any:
        done = subprocess.run(
            [COMMAND, "--json", "--state-dir", str(tmp_path / "state"), *arguments],
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None

    for image in (one, two):
        run("preload", image)
    before = {image["image"]: image["block_image"] for image in run("images")}
    run("repack", "--below", "2", code=2)
    assert run("repack", "--below", "0.01")["images"] == []
    run("rm", one)
    report = run("repack", "--below", "1")  # every pack has more than its chunks: headers
    assert report["images"] and report["chunks"] and report["packs"] and not report["failed"]
    for _ in range(5):
        run("gc", "--min-age", "0", "--grace", "0", "--yes-delete-many")
        run("verify", two)
    (left,) = run("images")
    assert before[left["image"]] == left["block_image"]
    assert run("stats")["garbage_pack_bytes"] == 0
