"""Picks the kernel modules a guest needs from an unpacked kernel package, in loading order."""

from __future__ import annotations

import gzip
import lzma
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imagecache.errors import Rejected, Unsupported

# Sets of modules. "always" and "pci" are loaded at boot; the others wait in the initramfs until the
# agent needs them. Names in REQUIRED must be there, as a module or built in.
SETS: Final[dict[str, tuple[str, ...]]] = {
    "always": ("virtio_mmio", "virtio_blk", "virtio_console", "erofs", "overlay"),
    "pci": ("virtio_pci",),
    "ext4": ("ext4",),
    "net": ("virtio_net", "af_packet"),
    "nbd": ("nbd",),
    "fuse": ("fuse", "virtiofs"),
    "nfs": ("nfs", "nfsv3", "nfsv4", "dns_resolver"),
    "vsock": ("vsock", "vmw_vsock_virtio_transport"),
    "verity": ("dm_mod", "dm_verity"),
    "rng": ("virtio_rng",),
}
REQUIRED: Final = frozenset({"virtio_blk", "virtio_console", "erofs", "overlay"})
_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_DEPENDS = re.compile(rb"(?<![a-z])depends=([A-Za-z0-9_,-]*)\0")
_MODULE_LIMIT: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Module:
    """A module to ship: its set, file name and decompressed ELF image."""

    set: str
    file: str
    image: bytes


def select_modules(tree: Path) -> tuple[list[Module], list[str]]:
    """Modules below a lib/modules/RELEASE directory in loading order, and required ones missing."""
    files = _files_by_name(tree)
    built_in = _built_in(tree)
    chosen: list[Module] = []
    placed: set[str] = set()

    def place(name: str, into: str, trail: tuple[str, ...]) -> None:
        if name in placed or name in built_in or name in trail:
            return
        path = files.get(name)
        if path is None:
            return
        image = read_module(path)
        for needed in dependencies(image):
            place(needed, into, (*trail, name))
        placed.add(name)
        chosen.append(Module(into, f"{name}.ko", image))

    for into, names in SETS.items():
        for name in names:
            place(name, into, ())
    missing = sorted(name for name in REQUIRED if name not in placed and name not in built_in)
    return chosen, missing


def dependencies(image: bytes) -> list[str]:
    """Names in the module's own `depends=` entry, normalised to underscores."""
    match = _DEPENDS.search(image)
    if match is None:
        return []
    return [_normal(name) for name in match[1].decode("ascii").split(",") if name]


def read_module(path: Path) -> bytes:
    """A module's ELF image, decompressed as its name says; raises Rejected, Unsupported."""
    raw = path.read_bytes()
    try:
        if path.name.endswith(".xz"):
            image = lzma.LZMADecompressor().decompress(raw, _MODULE_LIMIT)
        elif path.name.endswith(".gz"):
            image = gzip.decompress(raw)
        elif path.name.endswith(".zst"):
            image = _zstd(raw)
        else:
            image = raw
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise Rejected(f"kernel module {path.name} cannot be decompressed: {error}") from error
    if image[:4] != b"\x7fELF":
        raise Rejected(f"kernel module {path.name} is not an ELF file")
    return image


def _zstd(raw: bytes) -> bytes:
    try:
        # Only distributions with .ko.zst need it: the tool also runs before anything is installed.
        import zstandard  # noqa: PLC0415  (see above)
    except ImportError as error:
        raise Unsupported(
            "this kernel's modules need the Python package zstandard", remedy="run tools/setup"
        ) from error
    try:
        return zstandard.ZstdDecompressor().decompress(raw, max_output_size=_MODULE_LIMIT)
    except zstandard.ZstdError as error:
        raise Rejected(f"a kernel module cannot be decompressed: {error}") from error


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _files_by_name(tree: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(tree.rglob("*.ko*")):
        for suffix in _SUFFIXES:
            if path.name.endswith(suffix):
                found[_normal(path.name.removesuffix(suffix))] = path
    return found


def _built_in(tree: Path) -> frozenset[str]:
    listing = tree / "modules.builtin"
    if not listing.is_file():
        return frozenset()
    return frozenset(
        _normal(Path(line).name.removesuffix(".ko")) for line in listing.read_text().splitlines()
    )
