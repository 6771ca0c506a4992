"""The kernel and initramfs that tools/guest-kernel makes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cube.guest import cpio
from cube.guest.assets import ensure_guest

TOOL = Path(__file__).parents[2] / "tools" / "guest-kernel"


def test_tool_and_library_agree(guest_cache):
    done = subprocess.run([str(TOOL), "--json"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    files = ensure_guest(guest_cache)
    assert (answer["kernel"], answer["initrd"]) == (str(files.kernel), str(files.initrd))
    assert answer["initrd_bytes"] < 32 << 20


def test_initramfs_is_the_same_each_time(guest_cache):
    files = ensure_guest(guest_cache)
    before = files.initrd.read_bytes()
    files.initrd.unlink()
    assert ensure_guest(guest_cache).initrd.read_bytes() == before


def test_own_kernel_gets_an_initramfs_of_its_own(guest_cache):
    kernel = ensure_guest(guest_cache).kernel
    own = ensure_guest(guest_cache, kernel=kernel)
    assert own.kernel == kernel
    listing = _names(own.initrd)
    assert "init" in listing and "sbin/busybox" not in listing


def test_initramfs_holds_agent_modules_and_busybox(guest_cache):
    listing = _names(ensure_guest(guest_cache).initrd)
    assert {"init", "dev/console", "sbin/busybox", "modules/load"} <= set(listing)
    assert any(name.startswith("modules/") and "overlay" in name for name in listing)


def test_other_programs_read_our_archive():
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.program("init", b"#!/bin/true\n"),
    ]
    listing = subprocess.run(
        ["busybox", "cpio", "-tv"], input=cpio.archive(entries), capture_output=True, check=True
    ).stdout.decode()
    assert "crw-------" in listing
    assert "-rwxr-xr-x" in listing


def test_unusable_cache_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [str(TOOL), "--cache-dir", str(tmp_path / "file")], capture_output=True, text=True
    )
    assert done.returncode == 77
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def _names(archive: Path) -> list[str]:
    listing = subprocess.run(
        ["busybox", "cpio", "-t"], input=archive.read_bytes(), capture_output=True, check=True
    )
    return listing.stdout.decode().split()
