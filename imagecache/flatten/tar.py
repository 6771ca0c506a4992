"""A strict streaming tar parser: members of one layer, with their data in large pieces.

Understands V7, ustar, pax, GNU and star archives as container tools write them. What it accepts
and refuses is written down in RULES.md. It never sees a host path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten import kinds, paxrecords, sparse
from imagecache.flatten.decompress import LayerStream
from imagecache.flatten.kinds import shown
from imagecache.flatten.limits import Limits
from imagecache.flatten.tarcursor import TarCursor
from imagecache.flatten.tarheader import (
    BLOCK,
    ZERO_BLOCK,
    HeaderParser,
    RawHeader,
    is_header,
)
from imagecache.flatten.xattrs import Xattrs, checked

NO_XATTRS: Xattrs = ()
_KINDS = {
    b"0": kinds.REGULAR,
    b"\0": kinds.REGULAR,
    b"7": kinds.REGULAR,  # contiguous: a hint that nobody heeds
    b"S": kinds.REGULAR,  # GNU sparse
    b"1": kinds.HARD_LINK,
    b"2": kinds.SYMLINK,
    b"3": kinds.CHARACTER,
    b"4": kinds.BLOCK_DEVICE,
    b"5": kinds.DIRECTORY,
    b"6": kinds.FIFO,
    b"D": kinds.DIRECTORY,  # GNU incremental dump: a directory with a name list as payload
}


class Header(NamedTuple):
    """What a member says of its file. Raw names: the builder normalises and judges paths."""

    path: bytes
    kind: int  # kinds.*
    mode: int  # permission bits, 07777
    uid: int
    gid: int
    size: int  # logical bytes of a regular file, else 0
    mtime: int  # seconds, may be negative
    mtime_ns: int
    link: bytes  # target of a symlink or hard link
    rdev: int  # kinds.device_number
    xattrs: Xattrs
    position: int  # byte offset of the member's own header in the plaintext layer


class Member:
    """One file of the layer: its header, and its data while it is the current member."""

    __slots__ = ("_reader", "_segments", "header")

    def __init__(
        self, header: Header, reader: TarCursor, segments: sparse.Segments | None = None
    ) -> None:
        self.header = header
        self._reader = reader
        self._segments = segments

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """(logical offset, bytes) in ascending order; holes of sparse files are not yielded.

        Only for the current member of `members`, and only once; raises `Rejected` where the
        layer ends too early.
        """
        segments = self._segments
        if segments is None:
            segments = [(0, self.header.size)] if self.header.size else []
        for offset, length in segments:
            done = 0
            while done < length:
                piece = self._reader.read_payload(length - done)
                yield offset + done, piece
                done += len(piece)


class _Extensions:
    """What extension headers said about the next member."""

    __slots__ = ("count", "gnu_link", "gnu_name", "pax", "position", "sparse_numbers", "xattrs")

    def __init__(self) -> None:
        self.count = 0
        self.position = 0
        self.gnu_name: bytes | None = None
        self.gnu_link: bytes | None = None
        self.pax: dict[bytes, bytes] | None = None
        self.sparse_numbers: list[bytes] = []
        self.xattrs: dict[bytes, bytes] = {}


def members(stream: LayerStream, limits: Limits) -> Iterator[Member]:
    """The members of a layer in order; the whole stream is read and verified at the end.

    Unread data of a member is skipped when the iterator advances. Raises `Rejected` for anything
    malformed and `LimitExceeded` over the caps; the message says at which byte of the layer.
    """
    reader = TarCursor(stream)
    parser = HeaderParser()
    extensions = _Extensions()
    count = 0
    while True:
        block = reader.peek(BLOCK)
        if len(block) < BLOCK or block == ZERO_BLOCK:
            _end(reader, block, extensions)
            return
        position = reader.position
        where = f"member at byte {position}"
        reader.block(where)
        raw = parser.parse(block, where)
        if raw.size < 0:
            raise Rejected(f"{where}: negative size")
        if raw.typeflag in b"xXgLK" and raw.typeflag:
            _read_extension(reader, raw, extensions, position, limits)
            continue
        if raw.typeflag == b"V":  # a volume label describes no file
            reader.begin(0)
            extensions = _Extensions()
            continue
        count += 1
        if count > limits.entries:
            raise LimitExceeded(
                f"layer has more than {limits.entries} entries",
                remedy="raise [limits] entries if this image is trusted",
            )
        kind = _KINDS.get(raw.typeflag)
        if kind is None:
            raise Rejected(f"{where} {shown(raw.name)} has an unknown type {shown(raw.typeflag)}")
        if extensions.count or raw.typeflag == b"S":
            yield _extended_member(
                reader,
                raw,
                kind,
                block=block,
                extensions=extensions,
                position=position,
                limits=limits,
            )
            extensions = _Extensions()
        else:
            yield _plain_member(reader, raw, kind, position, limits)
        reader.finish_member()


def _end(reader: TarCursor, block: bytes, extensions: _Extensions) -> None:
    """End of archive: two zero blocks, or one, or none (all accepted), then anything."""
    if block and len(block) < BLOCK and block.strip(b"\0"):
        raise Rejected(
            f"layer ends at its byte {reader.position + len(block)} inside a header",
            remedy="the layer is truncated: push it again",
        )
    if extensions.count:
        raise Rejected(f"extension header at byte {extensions.position} has no member")
    if len(block) == BLOCK:
        second = reader.peek(2 * BLOCK)[BLOCK:]
        if second.strip(b"\0"):
            raise Rejected(
                f"one zero block at byte {reader.position}, and then no second one",
                remedy="the layer is no whole tar archive",
            )
    reader.drain()


def _read_extension(
    reader: TarCursor, raw: RawHeader, extensions: _Extensions, position: int, limits: Limits
) -> None:
    where = f"extension header at byte {position}"
    if raw.size > limits.extension_bytes:
        raise LimitExceeded(f"{where} has {raw.size} bytes, over {limits.extension_bytes}")
    extensions.count += 1
    extensions.position = position
    if extensions.count > limits.extensions_in_row:
        raise LimitExceeded(f"{where} follows {limits.extensions_in_row} others")
    reader.begin(raw.size)
    body = reader.take_all("an extension header")
    if raw.typeflag == b"L":
        extensions.gnu_name = body.partition(b"\0")[0]
    elif raw.typeflag == b"K":
        extensions.gnu_link = body.partition(b"\0")[0]
    else:
        records = paxrecords.parse_records(body, where)
        if raw.typeflag == b"g":
            # Checked and ignored, as container runtimes do; it belongs to no member.
            extensions.count -= 1
            return
        _add_records(records, extensions)


def _add_records(records: list[tuple[bytes, bytes]], extensions: _Extensions) -> None:
    pax = extensions.pax
    if pax is None:
        pax = extensions.pax = {}
    for key, value in records:
        if key.startswith(paxrecords.XATTR_PREFIX):
            extensions.xattrs[paxrecords.xattr_name(key)] = value
        elif key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            extensions.sparse_numbers.append(value)  # form 0.0 repeats its keys, in order
        elif value:
            pax[key] = value
        else:
            pax.pop(key, None)  # an empty value takes the key back


def _owner(uid: int, gid: int, where: str) -> None:
    if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF):
        raise Rejected(
            f"{where}: owner {uid}:{gid} is outside 0..4294967294",
            remedy="4294967295 means 'no owner' to Linux",
        )


def _plain_member(
    reader: TarCursor, raw: RawHeader, kind: int, position: int, limits: Limits
) -> Member:
    """A member that its one header block describes."""
    _, path, link, mode, uid, gid, size, mtime, _, _, _ = raw
    if not (0 <= uid < 0xFFFFFFFF and 0 <= gid < 0xFFFFFFFF):
        _owner(uid, gid, f"member at byte {position} {shown(path)}")
    if kind == kinds.REGULAR:
        if path.endswith(b"/"):
            kind = kinds.DIRECTORY
        reader.begin(size)
        if size > limits.logical_bytes:
            raise _too_large(path, position, size, limits)
        if kind == kinds.DIRECTORY:
            size = 0
    else:
        reader.begin(_hidden_payload(reader, raw, has_pax=False))
        size = 0
    rdev = 0
    if kind in kinds.DEVICES:
        rdev = _rdev(raw, position)
    if not paxrecords.MIN_TIME <= mtime <= paxrecords.MAX_TIME:
        mtime = paxrecords.clamp_time(mtime, 0)[0]
    header = Header(
        path, kind, mode & 0o7777, uid, gid, size, mtime, 0, link, rdev, NO_XATTRS, position
    )
    return Member(header, reader)


def _too_large(path: bytes, position: int, size: int, limits: Limits) -> LimitExceeded:
    return LimitExceeded(
        f"member at byte {position} {shown(path)} has {size} bytes, over {limits.logical_bytes}",
        remedy="raise [limits] logical_bytes if this image is trusted",
    )


def _rdev(raw: RawHeader, position: int) -> int:
    if not (0 <= raw.major <= kinds.MAX_MAJOR and 0 <= raw.minor <= kinds.MAX_MINOR):
        raise Rejected(
            f"member at byte {position} {shown(raw.name)}: device number "
            f"{raw.major}:{raw.minor} is outside Linux's 4095:1048575"
        )
    return kinds.device_number(raw.major, raw.minor)


def _hidden_payload(reader: TarCursor, raw: RawHeader, *, has_pax: bool) -> int:
    """Payload bytes behind a member that is no regular file.

    Links alone may carry some: pax archives do (POSIX), GNU ones never do, and of others what
    follows tells. GNU's directory dumps carry theirs. Elsewhere the size field has no meaning.
    """
    if raw.typeflag == b"D":
        return raw.size
    if raw.typeflag != b"1" or not raw.size or raw.is_gnu:
        return 0
    if has_pax:
        return raw.size
    return 0 if is_header(reader.peek(BLOCK)) else raw.size


def _extended_member(
    reader: TarCursor,
    raw: RawHeader,
    kind: int,
    *,
    block: bytes,
    extensions: _Extensions,
    position: int,
    limits: Limits,
) -> Member:
    """A member whose names, numbers or data map come from extension headers too."""
    pax = extensions.pax or {}
    has_pax = extensions.pax is not None
    path = raw.name if extensions.gnu_name is None else extensions.gnu_name
    link = raw.link if extensions.gnu_link is None else extensions.gnu_link
    path = pax.get(b"path", path)
    link = pax.get(b"linkpath", link)
    where = f"member at byte {position} {shown(path)}"
    if b"\0" in path or b"\0" in link or b"\0" in pax.get(b"GNU.sparse.name", b""):
        raise Rejected(f"{where}: a name holds a NUL byte")
    uid, gid = raw.uid, raw.gid
    stored, mtime, mtime_ns = raw.size, raw.mtime, 0
    if has_pax:
        if b"uid" in pax:
            uid = paxrecords.parse_decimal(pax[b"uid"], "uid", where)
        if b"gid" in pax:
            gid = paxrecords.parse_decimal(pax[b"gid"], "gid", where)
        if b"size" in pax:
            stored = paxrecords.parse_decimal(pax[b"size"], "size", where)
        if b"mtime" in pax:
            mtime, mtime_ns = paxrecords.parse_time(pax[b"mtime"], where)
    mtime, mtime_ns = paxrecords.clamp_time(mtime, mtime_ns)
    _owner(uid, gid, where)
    segments: sparse.Segments | None = None
    size = 0
    if kind == kinds.REGULAR:
        if stored > limits.logical_bytes:
            raise _too_large(path, position, stored, limits)
        size = stored
        if raw.typeflag == b"S":
            segments, size = sparse.gnu_segments(
                block, lambda: reader.block("a sparse map"), limits, where
            )
            reader.begin(stored)
        else:
            reader.begin(stored)
            path = pax.get(b"GNU.sparse.name", path)
            segments, size, stored = _pax_sparse(
                reader, extensions, stored, limits=limits, where=where
            )
        if path.endswith(b"/"):
            kind, size, segments = kinds.DIRECTORY, 0, None
        elif segments is not None:
            if size > limits.logical_bytes:
                raise _too_large(path, position, size, limits)
            segments = sparse.checked_segments(segments, stored, size, limits, where)
    else:
        hidden = raw._replace(size=stored)
        reader.begin(_hidden_payload(reader, hidden, has_pax=has_pax))
    xattrs = NO_XATTRS
    if extensions.xattrs and kind != kinds.HARD_LINK:
        xattrs = checked(extensions.xattrs, kind, limits, where)
    rdev = _rdev(raw, position) if kind in kinds.DEVICES else 0
    header = Header(
        path, kind, raw.mode & 0o7777, uid, gid, size, mtime, mtime_ns, link, rdev, xattrs, position
    )
    return Member(header, reader, segments)


def _pax_sparse(
    reader: TarCursor, extensions: _Extensions, stored: int, *, limits: Limits, where: str
) -> tuple[sparse.Segments | None, int, int]:
    """(map or None, logical size, stored data bytes) of a pax regular member."""
    pax = extensions.pax or {}
    version = (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor"))
    size = pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size")
    if version == (b"1", b"0"):
        segments, taken = sparse.data_segments(reader.payload_block, limits, where)
        stored -= taken
    elif b"GNU.sparse.map" in pax:
        segments = sparse.pax_segments(pax[b"GNU.sparse.map"].split(b","), limits, where)
    elif extensions.sparse_numbers:
        segments = sparse.pax_segments(extensions.sparse_numbers, limits, where)
    elif version == (None, None) and size is None:
        return None, stored, stored
    elif version == (None, None) or version[0] == b"0":
        segments = [(0, stored)] if stored else []
    else:
        raise Rejected(f"{where}: unknown sparse form {version!r}")
    if size is None:
        raise Rejected(f"{where}: sparse file without its real size")
    return segments, paxrecords.parse_decimal(size, "GNU.sparse.size", where), stored
