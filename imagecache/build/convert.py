"""One layer's blob -> its layer index, location table and packs. Runs in a worker process.

Large files are cut and encoded while they stream; small ones wait in a spool file until the file
table says in which order they stand. Nothing of a layer ever touches a host path: names are keys.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from imagecache.blockimage.extents import PieceBuilder
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable
from imagecache.build.chunksink import ChunkSink, FinishedPack
from imagecache.chunks import BLOCK
from imagecache.chunks.cut import FORMAT_CUT_RULE, blocks_of, squeeze
from imagecache.errors import Rejected
from imagecache.flatten.builder import FileTableBuilder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.filetable import FileTable, region_layout
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import Member, members

Runs = tuple[tuple[bool, int], ...]
PROGRESS_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What a conversion made: plaintext objects to seal and store, and what it cost."""

    index: bytes
    locations: bytes
    files: int
    chunks: int
    new_chunks: int
    stored_bytes: int


class LayerConverter:
    """Streams one layer; used once."""

    def __init__(
        self,
        directory: Path,
        known: dict[bytes, Location],
        announce: Callable[[FinishedPack], None],
        progress: Callable[[int], None],
        *,
        limits: Limits,
        level: int,
    ) -> None:
        self._limits = limits
        self._progress = progress
        self._sink = ChunkSink(directory, known, announce, level=level)
        self._builder = FileTableBuilder(limits)
        self._spool_path = directory / "small"
        self._spool_at = array("q")  # by content id; -1 for a large file
        self._large: dict[int, list[tuple[int, Runs]]] = {}  # content id -> (ticket, runs)

    def convert(self, blob: BinaryIO, diff_id: str) -> ConvertedLayer:
        """Raises Rejected for a layer that is broken, hostile or not the one named."""
        algorithm, _, wanted = diff_id.partition(":")
        hasher = hashlib.new(algorithm)
        stream = open_layer(blob, self._limits, hasher)
        reported = 0
        with self._spool_path.open("w+b") as spool:
            for member in members(stream, self._limits):
                self._take(member, spool)
                if stream.raw_bytes - reported >= PROGRESS_BYTES:
                    reported = stream.raw_bytes
                    self._progress(reported)
            stream.drain()
            if hasher.hexdigest() != wanted:
                raise Rejected(
                    f"a layer's content has diff id {algorithm}:{hasher.hexdigest()}, "
                    f"its image's config says {diff_id}",
                    remedy="the image is damaged: push it again",
                )
            table = self._builder.finish()
            laid = self._lay_region(table, spool)
        self._spool_path.unlink()
        self._sink.finish()
        return self._result(table, laid, diff_id)

    def _take(self, member: Member, spool: BinaryIO) -> None:
        content = len(self._spool_at)
        if not self._builder.add(member.header, content):
            return
        size = member.header.size
        if FORMAT_CUT_RULE.is_large(size):
            self._spool_at.append(-1)
            self._large[content] = [
                self._chunk(window) if window else (-1, ((True, blocks),))
                for blocks, window in _windows(member.pieces(), size)
            ]
            return
        self._spool_at.append(spool.tell())
        at = 0
        for offset, piece in member.pieces():
            if offset > at:
                spool.write(bytes(offset - at))
            spool.write(piece)
            at = offset + len(piece)
        spool.write(bytes(size - at))

    def _chunk(self, padded: bytes) -> tuple[int, Runs]:
        """Hands a window or group to the sink; ticket -1 where it is all zeros."""
        plaintext, runs = squeeze(padded)
        return (self._sink.submit(plaintext) if plaintext else -1), runs

    def _lay_region(self, table: FileTable, spool: BinaryIO) -> list[tuple[int, Runs]]:
        """The region's chunks in disk order as (ticket, runs)."""
        laid: list[tuple[int, Runs]] = []
        group: list[bytes] = []
        group_blocks = 0
        rule = FORMAT_CUT_RULE
        layout = region_layout(table)
        for inode, blocks in zip(layout.inodes, layout.blocks, strict=True):
            content = table.contents[inode]
            at = self._spool_at[content]
            if group and (at < 0 or group_blocks + blocks > rule.target_blocks):
                laid.append(self._chunk(b"".join(group)))
                group, group_blocks = [], 0
            if at < 0:
                laid.extend(self._large.pop(content))
                continue
            size = table.size[inode]
            spool.seek(at)
            group.append(spool.read(size))
            if size % BLOCK:
                group.append(bytes(BLOCK - size % BLOCK))
            group_blocks += blocks
            base_name = table.first_path(inode).rpartition(b"/")[2]
            if rule.ends_group(group_blocks, blocks, base_name):
                laid.append(self._chunk(b"".join(group)))
                group, group_blocks = [], 0
        if group:
            laid.append(self._chunk(b"".join(group)))
        return laid

    def _result(
        self, table: FileTable, laid: list[tuple[int, Runs]], diff_id: str
    ) -> ConvertedLayer:
        pieces = PieceBuilder()
        for ticket, runs in laid:
            if ticket < 0:
                pieces.zeros(sum(blocks for _, blocks in runs))
            else:
                pieces.chunk(self._sink.digests[ticket], runs)
        chunks, region = pieces.finish()
        index = LayerIndex(diff_id, table.encode(), chunks, region)
        plaintext = index.encode()
        subject = blake3(plaintext).digest()
        return ConvertedLayer(
            index=plaintext,
            locations=LocationTable.build(subject, self._sink.locations(chunks)).encode(),
            files=table.entry_count,
            chunks=len(chunks),
            new_chunks=self._sink.new_chunks,
            stored_bytes=self._sink.stored_bytes,
        )


def _windows(pieces: Iterator[tuple[int, bytes]], size: int) -> Iterator[tuple[int, bytes]]:
    """A large file as (blocks, padded content) at fixed offsets; content is empty in a hole."""
    window_bytes = FORMAT_CUT_RULE.target_blocks * BLOCK
    held = bytearray()
    start = 0  # the held window's offset in the file
    for piece_offset, piece in pieces:
        view, offset = memoryview(piece), piece_offset
        while view:
            if not held and offset >= start + window_bytes:
                skipped = (offset - start) // window_bytes
                yield skipped * FORMAT_CUT_RULE.target_blocks, b""
                start += skipped * window_bytes
            if offset >= start + window_bytes:
                yield _padded(held, window_bytes)
                held, start = bytearray(), start + window_bytes
                continue
            at = offset - start
            taken = min(len(view), window_bytes - at)
            if len(held) < at:
                held.extend(bytes(at - len(held)))
            held += view[:taken]
            view = view[taken:]
            offset += taken
            if len(held) == window_bytes:
                yield FORMAT_CUT_RULE.target_blocks, bytes(held)
                held, start = bytearray(), start + window_bytes
    if held:
        length = min(window_bytes, size - start)
        yield _padded(held, blocks_of(length) * BLOCK)
        start += length
    if start < size:
        yield blocks_of(size - start), b""


def _padded(held: bytearray, length: int) -> tuple[int, bytes]:
    return length // BLOCK, bytes(held) + bytes(length - len(held))
