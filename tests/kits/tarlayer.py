"""Writes tar layers by hand, honest and hostile ones: every header field can be given raw."""

from __future__ import annotations

from collections.abc import Mapping

BLOCK = 512
END = bytes(2 * BLOCK)
MTIME = 1_700_000_000


def octal(value: int | bytes, width: int) -> bytes:
    """A field of `width`: bytes as they are, small numbers octal, others base-256."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    raw = value.to_bytes(width, "big", signed=value < 0)
    return raw if value < 0 else bytes([raw[0] | 0x80]) + raw[1:]


def header(
    name: bytes,
    typeflag: bytes = b"0",
    *,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    size: int | bytes = 0,
    mtime: int | bytes = MTIME,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: int | bytes = 0,
    minor: int | bytes = 0,
    prefix: bytes = b"",
    checksum: bytes | None = None,
    signed: bool = False,
    patch: Mapping[int, bytes] | None = None,
) -> bytes:
    """One header block; `patch` overwrites bytes before the checksum is made."""
    assert len(name) <= 100 and len(link) <= 100
    block = bytearray(
        name.ljust(100, b"\0")
        + octal(mode, 8)
        + octal(uid, 8)
        + octal(gid, 8)
        + octal(size, 12)
        + octal(mtime, 12)
        + b" " * 8
        + typeflag
        + link.ljust(100, b"\0")
        + magic
        + b"root".ljust(32, b"\0")
        + b"root".ljust(32, b"\0")
        + octal(major, 8)
        + octal(minor, 8)
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    for offset, raw in (patch or {}).items():
        block[offset : offset + len(raw)] = raw
    assert len(block) == BLOCK
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = checksum if checksum is not None else b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Data and the zeros up to the next block."""
    return data + bytes(-len(data) % BLOCK)


def pax_records(records: Mapping[bytes, bytes] | list[tuple[bytes, bytes]]) -> bytes:
    """The body of a pax header."""
    body = b""
    for key, value in records.items() if isinstance(records, Mapping) else records:
        line = b" " + key + b"=" + value + b"\n"
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        body += str(length).encode() + line
    return body


def pax(
    records: Mapping[bytes, bytes] | list[tuple[bytes, bytes]] | bytes, typeflag: bytes = b"x"
) -> bytes:
    """A pax extended header, from records or from a raw body."""
    body = records if isinstance(records, bytes) else pax_records(records)
    return header(b"PaxHeaders/x", typeflag, size=len(body)) + padded(body)


def gnu_long(name: bytes, typeflag: bytes = b"L") -> bytes:
    """A GNU long name (L) or long link (K) header."""
    body = name + b"\0"
    return header(b"././@LongLink", typeflag, size=len(body), magic=b"ustar  \0") + padded(body)


class TarLayer:
    """Builds a layer member by member; names too long for a header get a pax path."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def raw(self, block: bytes) -> TarLayer:
        self.parts.append(block)
        return self

    def member(
        self,
        name: bytes,
        typeflag: bytes,
        data: bytes = b"",
        *,
        link: bytes = b"",
        records: Mapping[bytes, bytes] | None = None,
        xattrs: Mapping[bytes, bytes] | None = None,
        **fields: object,
    ) -> TarLayer:
        pax_fields = dict(records or {})
        for key, value in (xattrs or {}).items():
            pax_fields[b"SCHILY.xattr." + key] = value
        if len(name) > 100:
            pax_fields[b"path"] = name
            name = name[:100]
        if len(link) > 100:
            pax_fields[b"linkpath"] = link
            link = link[:100]
        if pax_fields:
            self.parts.append(pax(pax_fields))
        fields.setdefault("size", len(data))
        self.parts.append(header(name, typeflag, link=link, **fields))  # type: ignore[arg-type] # fields are header's own
        self.parts.append(padded(data))
        return self

    def file(self, name: bytes, data: bytes = b"", **fields: object) -> TarLayer:
        return self.member(name, b"0", data, **fields)  # type: ignore[arg-type] # as above

    def directory(self, name: bytes, mode: int = 0o755, **fields: object) -> TarLayer:
        return self.member(name, b"5", mode=mode, **fields)  # type: ignore[arg-type] # as above

    def symlink(self, name: bytes, target: bytes, **fields: object) -> TarLayer:
        return self.member(name, b"2", link=target, mode=0o777, **fields)  # type: ignore[arg-type] # as above

    def hardlink(self, name: bytes, target: bytes, **fields: object) -> TarLayer:
        return self.member(name, b"1", link=target, **fields)  # type: ignore[arg-type] # as above

    def whiteout(self, path: bytes) -> TarLayer:
        above, slash, name = path.rpartition(b"/")
        return self.file(above + slash + b".wh." + name)

    def opaque(self, directory: bytes) -> TarLayer:
        return self.file(directory + b"/.wh..wh..opq" if directory else b".wh..wh..opq")

    def device(self, name: bytes, kind: bytes, major: int, minor: int, **f: object) -> TarLayer:
        return self.member(name, kind, major=major, minor=minor, **f)  # type: ignore[arg-type] # as above

    def fifo(self, name: bytes, **fields: object) -> TarLayer:
        return self.member(name, b"6", **fields)  # type: ignore[arg-type] # as above

    def bytes(self) -> bytes:
        """The whole layer with its end blocks."""
        return b"".join(self.parts) + END
