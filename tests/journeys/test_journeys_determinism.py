"""Same image, same `block_image`: whatever the host's settings, the store's past or the user."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from imagemaker.entries import Entry
from kits.image import recipe_layout, reference, write_image
from kits.journey import ROOT, Cubecache
from testbed.processes import Stage


def build(cubecache: Cubecache, image: str, umask: int, **environment: str) -> str:
    outcome = subprocess.run(
        cubecache.command("preload", image, "--json"),
        check=False,
        capture_output=True,
        text=True,
        umask=umask,
        env=cubecache.full_environment(environment),
    )
    assert outcome.returncode == 0, outcome.stderr
    return str(json.loads(outcome.stdout)["block_image"])


def test_builds_under_different_settings_are_the_same(
    new_cubecache: Callable[..., Cubecache], busybox: str
) -> None:
    plain = build(new_cubecache(), busybox, 0o022, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="0")
    odd = build(
        new_cubecache(),
        busybox,
        0o077,
        TZ="Pacific/Kiritimati",
        LC_ALL="C.UTF-8",
        PYTHONHASHSEED="4294967295",
    )
    third = new_cubecache()
    third.preload(reference(recipe_layout("static-busybox-v2")))
    beside_a_relative = build(
        third, busybox, 0o000, TZ="America/St_Johns", LANG="tr_TR.UTF-8", PYTHONHASHSEED="random"
    )
    assert plain == odd == beside_a_relative


def test_a_real_image_built_by_nobody_in_a_sandbox_is_the_same(
    new_cubecache: Callable[..., Cubecache], python_numpy: str, stage: Stage, tmp_path: Path
) -> None:
    """An unprivileged user, no capabilities, no device but null, an empty PATH: no mount, mkfs,
    tar or loop device can be had, and the digest is the same."""
    normal = build(new_cubecache(), python_numpy, 0o022)
    assert sandboxed_build(stage.folder / "nobody", python_numpy) == normal
    relative = new_cubecache()
    relative.preload(reference(recipe_layout("python-numpy-v2")))
    assert build(relative, python_numpy, 0o027, TZ="Asia/Kolkata") == normal


def test_reference_images_give_their_chunks(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path
) -> None:
    """`preload --reference`, in the command itself and through a daemon: less is stored, and the
    digest is the same."""
    shared = [Entry(f"f{n}", content=random.Random(n).randbytes(90_000)) for n in range(12)]
    known = write_image(tmp_path / "known", [shared])
    first = write_image(tmp_path / "first", [[*shared, Entry("g1", content=b"1")]])
    second = write_image(tmp_path / "second", [[*shared, Entry("g2", content=b"2")]])
    alone = new_cubecache().preload(first)
    cubecache = new_cubecache()
    cubecache.preload(known)
    (here,) = cubecache.run("preload", first, "--reference", known, "--json").lines()
    assert here["block_image"] == alone["block_image"]
    assert here["stored_bytes"] * 4 < alone["stored_bytes"]
    cubecache.serve()
    (there,) = cubecache.run("preload", second, "--reference", known, "--json").lines()
    assert there["stored_bytes"] * 4 < alone["stored_bytes"]


SANDBOX = r"""
set -eu
state=$1
image=$2
root=$3
blocked=$4
# All in a private mount namespace. A checkout below a folder that only root may enter is shown at
# its own path, for the venv's paths are absolute.
mount -t tmpfs tmpfs /mnt
if [ -n "$blocked" ]; then
    mkdir /mnt/checkout
    mount --bind "$root" /mnt/checkout
    mount -t tmpfs -o mode=755 tmpfs "$blocked"
    mkdir -p "$root"
    mount --bind /mnt/checkout "$root"
fi
# No device but these: no /dev/loop, no /dev/fuse, no disks.
mkdir -p /mnt/dev/shm
chmod 1777 /mnt/dev/shm
for device in null urandom; do
    touch "/mnt/dev/$device"
    mount --bind "/dev/$device" "/mnt/dev/$device"
done
mount --rbind /mnt/dev /dev
exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --inh-caps=-all \
    --no-new-privs /usr/bin/env -i PATH=/nonexistent HOME="$state" TZ=Africa/Casablanca \
    "$root/.venv/bin/cubecache" --state-dir "$state" preload "$image" --json
"""


def sandboxed_build(state: Path, image: str) -> str:
    state.mkdir()
    layout = state / "layout"
    shutil.copytree(image.split(":")[1], layout)
    state.parent.chmod(0o755)
    for path in (state, *state.rglob("*")):
        os.chown(path, 65534, 65534)
    blocked = [folder for folder in ROOT.parents if not folder.stat().st_mode & 0o001]
    outcome = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", SANDBOX, "sandbox"),
            *(str(state), reference(layout), str(ROOT), str(blocked[-1]) if blocked else ""),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    return str(json.loads(outcome.stdout)["block_image"])
