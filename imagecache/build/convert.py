"""One layer's blob -> its layer index, location table and packs. Runs in a worker process.

Large files are cut and encoded while they stream; small ones wait in a spool file until the file
table says in which order they stand. Nothing of a layer ever touches a host path: names are keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from imagecache.blockimage.extents import PieceBuilder
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.seals import PackKey
from imagecache.build.chunksink import ChunkSink, FinishedPack
from imagecache.build.hashing import ThreadedHash
from imagecache.build.known import KnownChunks
from imagecache.chunks import BLOCK
from imagecache.chunks.cut import FORMAT_CUT_RULE, CutRule, blocks_of, squeeze
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
        known: KnownChunks,
        announce: Callable[[FinishedPack], None],
        progress: Callable[[int], None],
        *,
        limits: Limits,
        level: int,
        generation: int = 1,
        threads: int = 0,
        pack_key: PackKey | None = None,
        rule: CutRule = FORMAT_CUT_RULE,
    ) -> None:
        """Any other rule than the format's is for measuring: what it makes is no block image."""
        self._rule = rule
        self._limits = limits
        self._progress = progress
        self._sink = ChunkSink(
            directory,
            known,
            announce,
            generation=generation,
            level=level,
            threads=threads,
            pack_key=pack_key,
        )
        self._builder = FileTableBuilder(limits)
        self._spool_path = directory / "small"
        self._spool_at = array("q")  # by content id; -1 where nothing waits in the spool
        self._large: dict[int, list[tuple[int, Runs]]] = {}  # content id -> (ticket, runs)

    def convert(self, blob: BinaryIO, diff_id: str) -> ConvertedLayer:
        """Raises Rejected for a layer that is broken, hostile or not the one named."""
        algorithm, _, wanted = diff_id.partition(":")
        hasher = ThreadedHash(algorithm)
        stream = open_layer(blob, self._limits, hasher)
        reported = 0
        with self._spool_path.open("w+b") as spool:
            for member in members(stream, self._limits):
                self._take(member, spool)
                if stream.raw_bytes - reported >= PROGRESS_BYTES:
                    reported = stream.raw_bytes
                    self._progress(reported)
            stream.drain()
            found = hasher.hexdigest()
            if found != wanted:
                raise Rejected(
                    f"a layer's content has diff id {algorithm}:{found}, "
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
        rule = self._rule
        self._spool_at.append(-1)
        if rule.is_large(size):
            laid = self._large[content] = []
            for blocks, window in _windows(member.pieces(), size, rule.window_blocks):
                if window and blocks < rule.window_blocks and rule.groups_tails:
                    self._spool_at[content] = spool.tell()
                    spool.write(window)
                else:
                    laid.append(self._chunk(window) if window else (-1, ((True, blocks),)))
            return
        self._spool_at[content] = spool.tell()
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
        rule = self._rule
        layout = region_layout(table)
        for inode, file_blocks in zip(layout.inodes, layout.blocks, strict=True):
            content = table.contents[inode]
            at = self._spool_at[content]
            large = self._large.pop(content, None)
            blocks, size = file_blocks, table.size[inode]
            if large is not None and at >= 0:  # what waits is the padded rest of a large file
                blocks %= rule.window_blocks
                size = blocks * BLOCK
            if group and (large is not None or group_blocks + blocks > rule.group_blocks):
                laid.append(self._chunk(b"".join(group)))
                group, group_blocks = [], 0
            if large is not None:
                laid.extend(large)
                if at < 0:
                    continue
            spool.seek(at)
            body = spool.read(size)
            group.append(body)
            if size % BLOCK:
                group.append(bytes(BLOCK - size % BLOCK))
            group_blocks += blocks
            if rule.ends_group(group_blocks, blocks, table.first_path(inode), body):
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


def _windows(
    pieces: Iterator[tuple[int, bytes]], size: int, window_blocks: int
) -> Iterator[tuple[int, bytes]]:
    """A large file as (blocks, padded content) at fixed offsets; content is empty in a hole."""
    window_bytes = window_blocks * BLOCK
    held = bytearray()
    start = 0  # the held window's offset in the file
    for piece_offset, piece in pieces:
        view, offset = memoryview(piece), piece_offset
        while view:
            if not held and offset >= start + window_bytes:
                skipped = (offset - start) // window_bytes
                yield skipped * window_blocks, b""
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
                yield window_blocks, bytes(held)
                held, start = bytearray(), start + window_bytes
    if held:
        length = min(window_bytes, size - start)
        yield _padded(held, blocks_of(length) * BLOCK)
        start += length
    if start < size:
        yield blocks_of(size - start), b""


def _padded(held: bytearray, length: int) -> tuple[int, bytes]:
    return length // BLOCK, bytes(held) + bytes(length - len(held))
