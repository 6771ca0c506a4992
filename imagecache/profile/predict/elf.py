"""A reader of what ld.so needs of an ELF file: interpreter, needed names, search paths. Pure.

Layouts are those of the System V ABI (ELF header, program headers, dynamic section), 32 and 64
bit, either byte order. The reader asks for ranges of the file and is sent their bytes, so that
nothing else of a large library is fetched.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from imagecache.errors import Rejected

MAX_PROGRAM_HEADERS = 256
MAX_DYNAMIC_BYTES = 64 << 10
MAX_STRING = 4096
MAX_NEEDED = 512
_WHOLE_STRINGS = 1 << 20

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 15, 29
_ELF_TYPES = (2, 3)  # executable, shared object


@dataclass(frozen=True, slots=True)
class Segment:
    """A loaded part of the file, in bytes of the file; a writable one is relocated at the start."""

    offset: int
    length: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Elf:
    """What loading this file takes. `machine` and `bits` must agree within one program."""

    bits: int
    machine: int
    interpreter: bytes
    needed: tuple[bytes, ...]
    runpath: tuple[bytes, ...]
    rpath: tuple[bytes, ...]
    segments: tuple[Segment, ...]


Steps = Generator[tuple[int, int], bytes, Elf]
"""Yields (offset, length) of what it wants to see; is sent those bytes, fewer at the file's end."""


def read_elf() -> Steps:
    """Raises Rejected for what is no ELF file, or one outside the caps."""
    head = yield 0, 64
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        raise Rejected("not an ELF file")
    bits = 64 if head[4] == 2 else 32
    order = "<" if head[5] == 1 else ">"
    kind, machine = struct.unpack_from(order + "HH", head, 16)
    if kind not in _ELF_TYPES or len(head) < (64 if bits == 64 else 52):
        raise Rejected("an ELF file that no program loads")
    if bits == 64:
        (table_at,) = struct.unpack_from(order + "Q", head, 32)
        size, count = struct.unpack_from(order + "HH", head, 54)
    else:
        (table_at,) = struct.unpack_from(order + "I", head, 28)
        size, count = struct.unpack_from(order + "HH", head, 42)
    row = struct.Struct(order + ("IIQQQQQQ" if bits == 64 else "IIIIIIII"))
    if size != row.size or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise Rejected("an ELF file with unusual program headers")
    raw = yield table_at, size * count
    loads: list[tuple[int, int, int, bool]] = []  # file offset, address, file bytes, writable
    interpreter_at = dynamic_at = (0, 0)
    for fields in row.iter_unpack(raw[: len(raw) // size * size]):
        if bits == 64:
            which, flags, offset, address, _, length, _, _ = fields
        else:
            which, offset, address, _, length, _, flags, _ = fields
        if which == _PT_LOAD and length:
            loads.append((offset, address, length, bool(flags & 2)))
        elif which == _PT_INTERP:
            interpreter_at = offset, min(length, MAX_STRING)
        elif which == _PT_DYNAMIC:
            dynamic_at = offset, min(length, MAX_DYNAMIC_BYTES)
    interpreter = b""
    if interpreter_at[1]:
        interpreter = (yield interpreter_at).split(b"\0")[0]
    values: list[tuple[int, int]] = []
    if dynamic_at[1]:
        entry = struct.Struct(order + ("qQ" if bits == 64 else "iI"))
        raw = yield dynamic_at
        for tag, value in entry.iter_unpack(raw[: len(raw) // entry.size * entry.size]):
            if tag == 0:
                break
            values.append((tag, value))
    strings = yield from _strings(values, loads)
    found = {
        tag: [_string(strings, value) for name, value in values if name == tag]
        for tag in (_DT_NEEDED, _DT_RPATH, _DT_RUNPATH)
    }
    return Elf(
        bits=bits,
        machine=machine,
        interpreter=interpreter,
        needed=tuple(name for name in found[_DT_NEEDED][:MAX_NEEDED] if name),
        runpath=_paths(found[_DT_RUNPATH]),
        rpath=_paths(found[_DT_RPATH]),
        segments=tuple(Segment(at, length, writable) for at, _, length, writable in loads),
    )


def _strings(
    values: list[tuple[int, int]], loads: list[tuple[int, int, int, bool]]
) -> Generator[tuple[int, int], bytes, bytes]:
    table = dict(values)
    address, size = table.get(_DT_STRTAB, 0), table.get(_DT_STRSZ, 0)
    for offset, start, length, _ in loads:
        if size and start <= address < start + length:
            return (yield offset + address - start, min(size, _WHOLE_STRINGS))
    return b""


def _string(strings: bytes, at: int) -> bytes:
    end = strings.find(b"\0", at, at + MAX_STRING)
    return strings[at:end] if end >= 0 else b""


def _paths(texts: list[bytes]) -> tuple[bytes, ...]:
    return tuple(part for text in texts for part in text.split(b":") if part)[:64]
