"""What an image's tree must be, by judges not ours: GNU tar with the kernel's overlayfs; umoci."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kits.image import layer_blobs
from kits.journey import ROOT, tool


def unpack_layer(blob: Path, folder: Path) -> None:
    """Unpacks one layer by itself with GNU tar, whiteouts turned into overlayfs's own marks."""
    folder.mkdir(parents=True)
    with blob.open("rb", buffering=0) as raw:
        program = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(raw.read(2))
        raw.seek(0)
        command = [program, "-dc"] if program else ["cat"]
        tar = ["tar", "--extract", "--numeric-owner", "--same-owner", "--preserve-permissions"]
        tar += ["--xattrs", "--xattrs-include=*", "--delay-directory-restore"]
        tar += ["--warning=no-timestamp", "--warning=no-unknown-keyword"]
        with subprocess.Popen(command, stdin=raw, stdout=subprocess.PIPE) as plain:
            subprocess.run([*tar, "--directory", str(folder)], stdin=plain.stdout, check=True)
        assert plain.returncode == 0
    mark_whiteouts(os.fsencode(folder))


def mark_whiteouts(folder: bytes) -> None:
    for parent, _, names in os.walk(folder):
        status = os.lstat(parent)
        marks = [name for name in names if name.startswith(b".wh.")]
        for name in marks:
            os.unlink(os.path.join(parent, name))
            if name == b".wh..wh..opq":
                os.setxattr(parent, "trusted.overlay.opaque", b"y")
            else:
                hidden = os.path.join(parent, name.removeprefix(b".wh."))
                # A whiteout hides the layers below, never its own layer's entry.
                if not os.path.lexists(hidden):
                    os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0))
        if marks:
            os.utime(parent, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def overlay_of(layout: Path, scratch: Path) -> Iterator[Path]:
    """The image's tree as the kernel's overlayfs shows it over separately unpacked layers."""
    layers = []
    for number, blob in enumerate(layer_blobs(layout)):
        layers.append(scratch / f"{number}")
        unpack_layer(blob, layers[-1])
    merged = scratch / "merged"
    merged.mkdir()
    # Overlayfs wants two lower layers at least.
    bottom = scratch / "bottom"
    bottom.mkdir()
    lower = ":".join(path.name for path in [*reversed(layers), bottom])
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={lower}", str(merged)],
        check=True,
        cwd=scratch,
    )
    try:
        yield merged
    finally:
        subprocess.run(["umount", str(merged)], check=True)


def umoci_tree(layout: Path, scratch: Path) -> Path:
    """The image's tree as umoci unpacks it."""
    copy = scratch / "copy"
    shutil.copytree(layout, copy)
    tag = json.loads((copy / "index.json").read_bytes())["manifests"][0]["annotations"]
    name = tag["org.opencontainers.image.ref.name"]
    tree = scratch / "umoci"
    tool("umoci", "raw", "unpack", "--image", f"{copy}:{name}", str(tree))
    return tree


def differences(a: Path, b: Path, *options: str) -> list[str]:
    """What tools/compare_trees.py finds: one line per difference."""
    outcome = subprocess.run(
        [sys.executable, str(ROOT / "tools/compare_trees.py"), *options, str(a), str(b)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode in (0, 1), outcome.stderr
    return outcome.stdout.splitlines()
