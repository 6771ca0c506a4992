"""Independent unpackings of layers, to compare a face with: overlayfs, and umoci.

Overlayfs: each layer is unpacked alone by GNU tar into a directory of its own; whiteouts are turned
into overlayfs's form; the kernel shows the stack. Umoci: all layers into one directory (for hard
links that cross layers, which separate directories cannot hold).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from kits.layersdisk import mounted, run

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"


def unpack_layer(layer: bytes, target: Path) -> None:
    """One layer by GNU tar, all attributes kept, then whiteouts converted."""
    target.mkdir(mode=0o755)
    os.utime(target, (0, 0))
    source = target.with_suffix(".tar")
    source.write_bytes(layer)
    run(
        "tar", "-x", "-f", source, "-C", target, "--numeric-owner", "--same-owner", "-p",
        "--xattrs", "--xattrs-include=*", "--delay-directory-restore",
    )  # fmt: skip
    source.unlink()
    convert_whiteouts(os.fsencode(target))


def convert_whiteouts(root: bytes) -> None:
    """Replace .wh. files by character devices 0:0, and opaque marks by the xattr."""
    for directory, _, names in os.walk(root, topdown=False):
        marks = [name for name in names if name.startswith(WHITEOUT)]
        if not marks:
            continue
        times = os.stat(directory)
        for name in marks:
            os.unlink(os.path.join(directory, name))
            if name == OPAQUE:
                os.setxattr(directory, "trusted.overlay.opaque", b"y")
                continue
            hidden = os.path.join(directory, name[len(WHITEOUT) :])
            if not os.path.lexists(hidden):
                os.mknod(hidden, stat.S_IFCHR | 0o600, os.makedev(0, 0))
            elif os.path.isdir(hidden) and not os.path.islink(hidden):
                os.setxattr(hidden, "trusted.overlay.opaque", b"y")
        os.utime(directory, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def overlay_of(layers: Sequence[bytes], work: Path) -> Iterator[Path]:
    """The kernel's overlayfs over the layers, on a tmpfs (which holds every time and owner)."""
    with mounted("tmpfs", work / "tmpfs", "tmpfs", "size=2g,mode=755") as base:
        lowers = [base / f"l{number}" for number in range(len(layers))]
        for layer, lower in zip(layers, lowers, strict=True):
            unpack_layer(layer, lower)
        (base / "empty").mkdir()  # overlayfs wants two lower layers when there is no upper one
        stack = ":".join(str(lower) for lower in [*reversed(lowers), base / "empty"])
        with mounted("overlay", work / "overlay", "overlay", f"ro,lowerdir={stack}") as merged:
            yield merged


def write_layout(layers: Sequence[bytes], target: Path) -> None:
    """An OCI image layout with one image, tagged "t", of uncompressed layers."""
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(blob: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(blob).hexdigest()
        (blobs / digest).write_bytes(blob)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(blob)}

    prefix = "application/vnd.oci.image"
    descriptors = [put(layer, f"{prefix}.layer.v1.tar") for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [item["digest"] for item in descriptors]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{prefix}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), f"{prefix}.config.v1+json"),
        "layers": descriptors,
    }
    top = put(json.dumps(manifest).encode(), f"{prefix}.manifest.v1+json")
    top["annotations"] = {"org.opencontainers.image.ref.name": "t"}
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (target / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


@contextlib.contextmanager
def umoci_of(layers: Sequence[bytes], work: Path) -> Iterator[Path]:
    """All layers unpacked by umoci into one directory on a tmpfs."""
    with mounted("tmpfs", work / "tmpfs", "tmpfs", "size=2g,mode=755") as base:
        write_layout(layers, base / "layout")
        run("umoci", "raw", "unpack", "--image", f"{base / 'layout'}:t", base / "rootfs")
        yield base / "rootfs"
