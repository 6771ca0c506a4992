"""The report of one start. Pure."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from imagecache.cache.events import Cause, Wait
from imagecache.cache.stream import StreamOutcome
from imagecache.chunks import BLOCK
from imagecache.explain.counterfactual import Stall, with_stream
from imagecache.imageview import ImageView
from imagecache.profile.mapping import ordinals_of
from imagecache.profile.prepare import LoadedImage
from imagecache.profile.profile import Profile
from imagecache.profile.recorder import FirstRead, StartLog

VERSION = 1
MAX_STALLS = 2000
MAX_READS = 4000
MAP_CELLS = 400
_FILES = 40
_LEAST_STREAM_SECONDS = 0.01

# Where the bytes of a waiting read came from, by the cause of its wait.
_TIERS = {
    Cause.COLD: "store",
    Cause.ROT: "store",
    Cause.LATE: "store, asked for ahead",
    Cause.JOINED: "store, asked for by another read",
    Cause.FIRST_USE: "local cache",
    Cause.COPY: "local cache",
}


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was brought before anybody read it; chunk ordinals of the image."""

    source: str
    sources: int
    streamed: tuple[int, ...]
    asked: tuple[int, ...]
    outcome: StreamOutcome | None
    error: str | None


@dataclass(frozen=True, slots=True)
class StartFacts:
    """What the daemon knows of a start besides its log.

    `begun` is wall-clock time; `fetched_bytes` and `gets` are the whole daemon's during the start;
    `get_seconds` what a demand GET takes of late.
    """

    export: str
    reference: str
    begun: float
    fetched_bytes: int
    gets: int
    get_seconds: float
    ahead: Ahead


def build_report(
    facts: StartFacts, log: StartLog, image: LoadedImage, profile: Profile | None
) -> dict[str, Any]:
    """The report as JSON values; times in seconds from the start's first read, sizes in bytes."""
    reads = list(log.first_reads())
    zero = log.first_read if log.first_read is not None else log.opened
    waits = [*log.waits, *log.last_waits]
    until = log.ended if log.ended is not None else float("inf")
    waits = [wait for wait in waits if wait.begin <= until]
    last = max([read.at for read in reads] + [w.begin + w.seconds for w in waits], default=zero)
    touched = sum(read.blocks for read in reads) * BLOCK
    chunks = _touched_chunks(image, reads)
    chunk_bytes = sum(image.map.length(n) for n in chunks)
    stored = sum(image.stored_lengths[n] for n in chunks)
    stalls = [_stall(image.view, wait, zero) for wait in waits]
    return {
        "version": VERSION,
        "export": facts.export,
        "reference": facts.reference,
        "image": image.root.image,
        "block_image": image.root.block_image,
        "begun": datetime.fromtimestamp(facts.begun, UTC).isoformat(timespec="milliseconds"),
        "exported_before_first_read_seconds": round(zero - log.opened, 6),
        "over": log.ended is not None,
        "seconds": round(last - zero, 6),
        "reads": log.start_reads,
        "read_bytes": log.start_bytes,
        "touched_bytes": touched,
        "touched_chunks": len(chunks),
        "stalls": {
            "count": len(stalls) + log.dropped_waits,
            "seconds": round(sum(wait.seconds for wait in waits), 6),
            "wall_seconds": round(_covered(waits), 6),
            "by_cause": _by_cause(waits),
            "by_file": _by_file(stalls),
            "longest": sorted(stalls, key=lambda x: -x["seconds"])[:20],
            "listed": stalls[:MAX_STALLS],
            "not_listed": max(0, len(stalls) - MAX_STALLS) + log.dropped_waits,
        },
        "amplification": {
            "chunk_bytes_per_touched_byte": _ratio(chunk_bytes, touched),
            "stored_bytes_of_touched_chunks": stored,
            "fetched_bytes": facts.fetched_bytes,
            "fetched_per_stored_byte_touched": _ratio(facts.fetched_bytes, stored),
            "gets": facts.gets,
        },
        "ahead": _ahead(facts.ahead, chunks, image),
        "counterfactual": _counterfactual(facts, waits, zero, image, profile),
        "waterfall": _waterfall(reads, zero, log.dropped_touches),
        "map": _disk_map(image, reads, facts.ahead, zero),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 3) if whole else None


def place_of(view: ImageView, offset: int) -> tuple[str, int | None]:
    """What a disk offset belongs to, for people, and the offset in that file."""
    if offset < view.manifest.metadata_blocks * BLOCK:
        return "(metadata)", None
    found = view.path_at(offset)
    return ("(gap)", None) if found is None else ("/" + os.fsdecode(found[0]), found[1])


def _stall(view: ImageView, wait: Wait, zero: float) -> dict[str, Any]:
    path, inside = place_of(view, wait.offset)
    return {
        "at": round(wait.begin - zero, 6),
        "seconds": round(wait.seconds, 6),
        "offset": wait.offset,
        "length": wait.length,
        "path": path,
        "file_offset": inside,
        "tier": _TIERS[wait.cause],
        "cause": str(wait.cause),
        "chunks": wait.chunks,
        "error": wait.error,
    }


def _covered(waits: Sequence[Wait]) -> float:
    """The time in which at least one read waited."""
    total, end = 0.0, float("-inf")
    for wait in sorted(waits, key=lambda x: x.begin):
        stop = wait.begin + wait.seconds
        total += max(0.0, stop - max(end, wait.begin))
        end = max(end, stop)
    return total


def _by_cause(waits: Sequence[Wait]) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for wait in waits:
        found[str(wait.cause)].append(wait.seconds)
    return {
        cause: {
            "count": len(seconds),
            "seconds": round(sum(seconds), 6),
            "longest": round(max(seconds), 6),
        }
        for cause, seconds in sorted(found.items())
    }


def _by_file(stalls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = defaultdict(list)
    for stall in stalls:
        found[stall["path"]].append(stall["seconds"])
    rows = [
        {"path": path, "count": len(seconds), "seconds": round(sum(seconds), 6)}
        for path, seconds in found.items()
    ]
    return sorted(rows, key=lambda row: (-float(str(row["seconds"])), str(row["path"])))[:_FILES]


def _touched_chunks(image: LoadedImage, reads: Sequence[FirstRead]) -> set[int]:
    chunks: set[int] = set()
    for read in reads:
        start = read.start_block * BLOCK
        chunks.update(image.map.ordinals_in(start, start + read.blocks * BLOCK))
    return chunks


def _ahead(ahead: Ahead, touched: set[int], image: LoadedImage) -> dict[str, Any]:
    brought = set(ahead.streamed) | set(ahead.asked)
    hits = brought & touched
    wasted = brought - touched
    return {
        "source": ahead.source,
        "recordings": ahead.sources,
        "chunks": len(brought),
        "stored_bytes": sum(image.stored_lengths[n] for n in brought),
        "hits": len(hits),
        "hit_rate": _ratio(len(hits), len(touched)),
        "wasted_chunks": len(wasted),
        "wasted_bytes": sum(image.stored_lengths[n] for n in wasted),
        "waste_rate": _ratio(len(wasted), len(brought)),
        "stream": None if ahead.outcome is None else asdict(ahead.outcome),
        "error": ahead.error,
    }


def _counterfactual(
    facts: StartFacts,
    waits: Sequence[Wait],
    zero: float,
    image: LoadedImage,
    profile: Profile | None,
) -> dict[str, Any] | None:
    """What the same start would have waited with the profile that the store has today."""
    if profile is None or not waits:
        return None
    outcome = facts.ahead.outcome
    rate, basis = 50e6, "assumed"
    if outcome is not None and outcome.bytes and outcome.seconds > _LEAST_STREAM_SECONDS:
        rate, basis = outcome.bytes / outcome.seconds, "measured by this start's stream"
    first_byte = facts.get_seconds
    cold = sorted(wait.seconds for wait in waits if wait.cause is Cause.COLD)
    if cold:
        first_byte = cold[len(cold) // 2]
    if outcome is not None and outcome.first_byte_seconds is not None:
        first_byte = outcome.first_byte_seconds
    plan = ordinals_of(image.view, profile, image.stored_lengths)
    stalls = [
        Stall(
            at=wait.begin - zero,
            seconds=wait.seconds,
            chunks=tuple(image.map.ordinals_in(wait.offset, wait.offset + wait.length)),
        )
        for wait in sorted(waits, key=lambda x: x.begin)
    ]
    found = with_stream(stalls, plan, image.stored_lengths, first_byte=first_byte, rate=rate)
    return {
        "recordings": profile.sources,
        "plan_chunks": len(plan),
        "plan_bytes": sum(image.stored_lengths[n] for n in plan),
        "first_byte_seconds": round(first_byte, 6),
        "bytes_per_second": round(rate),
        "rate_is": basis,
        "wall_seconds": round(found.before, 6),
        "wall_seconds_with_profile": round(found.after, 6),
        "stalls_not_covered": found.not_covered,
    }


def _waterfall(reads: Sequence[FirstRead], zero: float, dropped: int) -> dict[str, Any]:
    step = max(1, -(-len(reads) // MAX_READS))
    return {
        "reads": [
            [round(x.at - zero, 6), x.start_block * BLOCK, x.blocks * BLOCK, int(x.hit)]
            for x in reads[::step]
        ],
        "one_in": step,
        "dropped": dropped,
    }


def _disk_map(
    image: LoadedImage, reads: Sequence[FirstRead], ahead: Ahead, zero: float
) -> dict[str, Any]:
    """The disk in cells of equal size: what was read of each, when first, and how it had come."""
    manifest = image.view.manifest
    size = manifest.disk_blocks * BLOCK
    cell = max(BLOCK, -(-size // MAP_CELLS))
    cells: dict[int, dict[str, Any]] = {}
    for read in reads:
        at, end = read.start_block * BLOCK, (read.start_block + read.blocks) * BLOCK
        while at < end:
            number = at // cell
            stop = min(end, (number + 1) * cell)
            row = cells.setdefault(
                number, {"cell": number, "first": round(read.at - zero, 6), "read": 0, "missed": 0}
            )
            row["read"] += stop - at
            row["missed"] += 0 if read.hit else stop - at
            at = stop
    brought = set(ahead.streamed) | set(ahead.asked)
    ahead_cells: set[int] = set()
    if brought:
        starts, ends, ordinals = image.map.starts, image.map.ends, image.map.ordinals
        for start, stop, ordinal in zip(starts, ends, ordinals, strict=True):
            if ordinal in brought:
                ahead_cells.update(range(start // cell, (stop - 1) // cell + 1))
    regions = [{"name": "metadata", "start": 0, "end": manifest.metadata_blocks * BLOCK}]
    regions += [
        {
            "name": f"layer {number + 1}",
            "start": layer.start_block * BLOCK,
            "end": (layer.start_block + layer.blocks) * BLOCK,
        }
        for number, layer in enumerate(manifest.layers)
    ]
    return {
        "size_bytes": size,
        "cell_bytes": cell,
        "cells": [cells[number] for number in sorted(cells)],
        "ahead": sorted(ahead_cells),
        "regions": regions,
    }
