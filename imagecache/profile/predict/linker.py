"""Where ld.so looks for a library, as its manual page (ld.so(8)) tells. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence

from imagecache.profile.predict.elf import Elf

CONFIG = b"etc/ld.so.conf"
CONFIG_DIRECTORY = b"etc/ld.so.conf.d"
MAX_DIRECTORIES = 256

# By ELF machine number: the Debian triplet of its multiarch directories.
_TRIPLETS = {
    3: b"i386-linux-gnu",
    40: b"arm-linux-gnueabihf",
    62: b"x86_64-linux-gnu",
    183: b"aarch64-linux-gnu",
    243: b"riscv64-linux-gnu",
}


def default_directories(elf: Elf) -> list[bytes]:
    """The directories that every program's loader knows."""
    found = [b"lib64", b"usr/lib64"] if elf.bits == 64 else []
    triplet = _TRIPLETS.get(elf.machine)
    if triplet is not None:
        found += [b"lib/" + triplet, b"usr/lib/" + triplet]
    return [*found, b"lib", b"usr/lib", b"usr/local/lib"]


def configured_directories(texts: Sequence[bytes]) -> list[bytes]:
    """The directories that files of ld.so.conf's form name; `include` is the caller's to follow."""
    found: list[bytes] = []
    for text in texts:
        for line in text.split(b"\n"):
            words = line.partition(b"#")[0].split()
            if words and words[0] not in (b"include", b"hwcap"):
                found += [word.strip(b":,") for word in words if word.startswith(b"/")]
    return [path.strip(b"/") for path in found[:MAX_DIRECTORIES]]


def candidates(
    name: bytes,
    elf: Elf,
    path: bytes,
    *,
    environment: Sequence[bytes],
    configured: Sequence[bytes],
    inherited_rpath: Sequence[bytes] = (),
) -> Iterator[bytes]:
    """Paths at which the library `name`, needed by `elf` at `path`, may stand, best first.

    `environment` are the directories of LD_LIBRARY_PATH; `inherited_rpath` the DT_RPATH of those
    that loaded `elf`.
    """
    if b"/" in name:
        yield normal(expanded(name, path))
        return
    rpath = [] if elf.runpath else [*elf.rpath, *inherited_rpath]
    for directory in (
        *(expanded(part, path) for part in rpath),
        *environment,
        *(expanded(part, path) for part in elf.runpath),
        *configured,
        *default_directories(elf),
    ):
        yield normal(directory + b"/" + name)


def expanded(text: bytes, path: bytes) -> bytes:
    """`$ORIGIN` replaced by the directory of the file at `path`."""
    origin = b"/" + path.rpartition(b"/")[0]
    text = text.replace(b"${ORIGIN}", origin).replace(b"$ORIGIN", origin)
    return text.replace(b"${LIB}", b"lib").replace(b"$LIB", b"lib")


def normal(path: bytes) -> bytes:
    """A path inside the image: no leading slash, no dots."""
    return posixpath.normpath(b"/" + path).lstrip(b"/")
