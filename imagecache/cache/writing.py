"""One batch of admissions on the disk: blocking; the arena decides before and judges after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from imagecache.cache.slotfile import SlotFile
from imagecache.cache.slots import Reservation
from imagecache.chunks import BLOCK, MAX_CHUNK_BLOCKS

SUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Work:
    """A verified chunk and the slot that was reserved for it."""

    reservation: Reservation
    digest: bytes
    plaintext: bytes


@dataclass(slots=True)
class Written:
    """What became of one write.

    `punched` answers the reservation's punches in order and ends where an error stopped them;
    `healed`: the file had another size than it should.
    """

    error: OSError | None = None
    healed: bool = False
    punched: list[bool] = field(default_factory=list)
    sums: bytes | None = None


def write_all(
    file: SlotFile, work: Sequence[Work], *, can_punch: bool, with_sums: bool
) -> list[Written]:
    """Gives back what must go, and writes; each chunk by itself, whatever becomes of the others."""
    return [_write(file, item, can_punch, with_sums) for item in work]


def _write(file: SlotFile, item: Work, can_punch: bool, with_sums: bool) -> Written:
    reservation, outcome = item.reservation, Written()
    try:
        outcome.healed = file.heal_size()
        for slot in reservation.punches:
            outcome.punched.append(file.punch(slot, 0, MAX_CHUNK_BLOCKS))
        file.write(reservation.slot, item.plaintext)
        tail = reservation.stale_blocks - reservation.blocks
        if tail > 0 and can_punch:
            file.punch(reservation.slot, reservation.blocks, tail)
    except OSError as error:
        outcome.error = error
    if with_sums:
        outcome.sums = block_sums(item.plaintext)
    return outcome


def block_sums(plaintext: bytes | memoryview) -> bytes:
    """XXH3-64 of each block, 8 bytes each: a guard against rot, never an address."""
    view = memoryview(plaintext)
    digest = xxhash.xxh3_64_digest
    return b"".join([digest(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK)])
