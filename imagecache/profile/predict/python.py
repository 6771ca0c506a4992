"""What a Python program loads: its interpreter's start-up modules, and imports by text. Pure.

Imports are found by reading lines, not by compiling: a source of the image is a stranger's text,
and a missed import costs a fetch later, no more.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_SOURCE = 1 << 20
MAX_MODULES = 4096

_PROGRAM = re.compile(rb"(?:.*/)?python(\d)(?:\.(\d{1,3}))?")
_BLOCK = re.compile(rb"([ \t]*)(?:async[ \t]+)?def\b")
_FROM = re.compile(rb"([ \t]*)from[ \t]+([.\w]+)[ \t]+import\b[ \t]*(.*)")
_IMPORT = re.compile(rb"([ \t]*)import[ \t]+([\w., \t]+)")
_NAME = re.compile(rb"\w+")

# What a Python 3 interpreter loads before it looks at its program (`python3 -X importtime`).
_START_UP = """
encodings encodings.aliases encodings.utf_8 encodings.latin_1 codecs io abc site os stat posixpath
genericpath _collections_abc _sitebuiltins _distutils_hack sitecustomize usercustomize types
warnings contextlib collections heapq keyword operator reprlib functools importlib
importlib._bootstrap importlib._bootstrap_external importlib.machinery importlib._abc importlib.util
"""
START_UP: tuple[bytes, ...] = tuple(_START_UP.encode().split())


@dataclass(frozen=True, slots=True)
class Import:
    """A name that a module imports; `level` leading dots. `names` may be its submodules."""

    module: bytes
    level: int
    names: tuple[bytes, ...]


def version_of(program: bytes) -> tuple[int, int | None] | None:
    """(major, minor) of a Python interpreter by its path, None for another program."""
    match = _PROGRAM.fullmatch(program)
    if match is None:
        return None
    return int(match[1]), int(match[2]) if match[2] else None


def imports_of(source: bytes) -> Iterator[Import]:
    """The imports that run when the module is imported: those in no function's body."""
    lines = iter(source.replace(b"\r\n", b"\n").split(b"\n"))
    inside: int | None = None  # the indentation of the function we are in
    for line in lines:
        stripped = line.lstrip()
        if not stripped or stripped.startswith(b"#"):
            continue
        indent = len(line) - len(stripped)
        if inside is not None and indent > inside:
            continue
        inside = None
        if _BLOCK.match(line):
            inside = indent
            continue
        match = _FROM.match(line)
        if match:
            names = match[3]
            if names.lstrip().startswith(b"("):
                while b")" not in names:
                    more = next(lines, None)
                    if more is None or len(names) > 1 << 16:
                        break
                    names += b" " + more.partition(b"#")[0]
            while names.rstrip().endswith(b"\\"):
                names = names.rstrip()[:-1] + b" " + next(lines, b"")
            yield _from(match[2], names)
            continue
        match = _IMPORT.match(line)
        if match:
            for part in match[2].split(b","):
                name = part.split()[:1]
                if name:
                    yield Import(name[0], 0, ())


def _from(module: bytes, names: bytes) -> Import:
    level = len(module) - len(module.lstrip(b"."))
    found = []
    for part in names.partition(b"#")[0].strip(b"() \t,").split(b","):
        match = _NAME.match(part.strip())
        if match:
            found.append(match[0])
    return Import(module[level:], level, tuple(found[:1024]))


def absolute(found: Import, package: bytes) -> Iterator[bytes]:
    """The modules that an import in `package` may load, as dotted names, parents first."""
    base = found.module
    if found.level:
        parts = package.split(b".") if package else []
        keep = len(parts) - (found.level - 1)
        if keep < 0:
            return
        base = b".".join([*parts[:keep], *([found.module] if found.module else [])])
    steps = base.split(b".") if base else []
    for count in range(1, len(steps) + 1):
        yield b".".join(steps[:count])
    for name in found.names:
        yield b".".join([*steps, name])


def search_path(
    root: bytes, version: tuple[int, int], script_directory: bytes, environment: Sequence[bytes]
) -> list[bytes]:
    """Directories of modules, best first. `root` is the interpreter's prefix (`usr`)."""
    name = b"python%d.%d" % version
    found = [script_directory, *environment]
    found += [root + b"/lib/" + name, root + b"/lib/" + name + b"/lib-dynload"]
    # Debian's own modules come before those of one version of the interpreter.
    found.append(b"usr/local/lib/" + name + b"/dist-packages")
    found.append(b"usr/lib/python%d/dist-packages" % version[0])
    for prefix in dict.fromkeys((b"usr/local", root, b"usr")):
        found.append(prefix + b"/lib/" + name + b"/site-packages")
        found.append(prefix + b"/lib/" + name + b"/dist-packages")
    return list(dict.fromkeys(part.strip(b"/") for part in found))


def files_of(module: bytes, directory: bytes) -> Iterator[bytes]:
    """Paths of sources at which a module may stand in a directory of the search path."""
    base = directory + b"/" + module.replace(b".", b"/")
    yield base + b"/__init__.py"
    yield base + b".py"


def extension_suffixes(version: tuple[int, int], triplet: bytes) -> tuple[bytes, ...]:
    """The endings of compiled modules."""
    return (b".cpython-%d%d-%s.so" % (*version, triplet), b".abi3.so", b".so")


def is_current(head: bytes, modified: int, size: int) -> bool:
    """Whether byte code that begins with `head` is used instead of its source (PEP 552).

    Where it is not, or is compared with the source's hash at each import, both are read.
    """
    if len(head) < 16:
        return False
    flags, told_time, told_size = struct.unpack_from("<III", head, 4)
    if flags & 1:
        return not flags & 2  # named by the source's hash: where that is checked, it is read
    return bool(told_time == modified & 0xFFFFFFFF and told_size == size & 0xFFFFFFFF)


def compiled(source: bytes, version: tuple[int, int]) -> bytes:
    """The path of a source's byte code."""
    directory, _, name = source.rpartition(b"/")
    return b"%s/__pycache__/%s.cpython-%d%d.pyc" % (directory, name[: -len(b".py")], *version)
