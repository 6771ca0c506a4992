"""Which chunk is in which slot, what may be evicted, and the count of what the slots occupy.

Pure state, owned by the event loop; all I/O is elsewhere. Slots go FREE -> WRITING -> CHECKED ->
FREE; rows of an earlier run start as UNCHECKED; a dropped one waits as DOOMED for its last pin.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from imagecache.cache.recency import Hold, Recency
from imagecache.chunks import MAX_CHUNK_BLOCKS

NO_SERIAL = 0xFFFFFFFF
"""The serial that no slot ever has: what a device stores for "no position known"."""


class SlotState(IntEnum):
    """What a slot holds."""

    FREE = 0
    WRITING = 1  # reserved; its bytes are on their way
    UNCHECKED = 2  # indexed by an earlier run; not to be shown before its digest matched
    CHECKED = 3
    DOOMED = 4  # dropped, but pinned
    PUNCHING = 5  # free; its blocks are on their way back to the file system
    LOST = 6  # its medium fails; not used again in this run
    UNKNOWN = 7  # holds data that no index names; recovery will look


_PRESENT = (SlotState.UNCHECKED, SlotState.CHECKED)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot to write, and the slots whose blocks must be given back before that."""

    slot: int
    blocks: int
    stale_blocks: int  # what the slot still occupies
    punches: tuple[int, ...]


class SlotTable:
    """All slots of one arena. Sizes in blocks; a slot of `occupied` 0 is a hole in the file."""

    def __init__(self, slot_count: int, budget_blocks: int) -> None:
        self.slot_count = slot_count
        self.budget_blocks = budget_blocks
        self.used_blocks = 0
        self.can_punch = True
        self.serials = array("I", bytes(4 * slot_count))
        self.states = bytearray(slot_count)
        self.blocks = bytearray(slot_count)
        self.digests: list[bytes | None] = [None] * slot_count
        self.recency = Recency(slot_count, budget_blocks, self.blocks)
        self.evicted: list[int] = []  # since the arena last collected them, for the index
        self.evictions = 0
        self.wasted = 0
        self.unchecked = 0
        self.pinned = 0
        self.leased_bytes = 0  # as the holders reckon it; shared content counts for each
        self._pins = array("I", bytes(4 * slot_count))
        self._occupied = bytearray(slot_count)
        self._slot_of: dict[bytes, int] = {}
        self._leases: dict[bytes, int] = {}
        self._fresh = 0  # slots from here on were never used
        self._clean: list[int] = []  # free, nothing on disk
        self._dirty: dict[int, None] = {}  # free, blocks still on disk
        self._unknown: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._slot_of)

    # --- looking up

    def find(self, digest: bytes) -> int:
        """The slot that holds a chunk, checked or not; -1 where there is none."""
        return self._slot_of.get(digest, -1)

    def checked(self, digest: bytes) -> int:
        """The slot whose bytes may be shown for a chunk; -1 where there is none."""
        slot = self._slot_of.get(digest, -1)
        return slot if slot >= 0 and self.states[slot] == SlotState.CHECKED else -1

    def digest_of(self, slot: int) -> bytes:
        """The chunk in a slot that holds one."""
        digest = self.digests[slot]
        if digest is None:
            raise KeyError(f"slot {slot} holds no chunk")
        return digest

    def present_slots(self) -> Iterable[int]:
        """The slots that hold a chunk now, in the order of admission."""
        return tuple(self._slot_of.values())

    # --- admission and eviction

    def reserve(self, blocks: int) -> Reservation | None:
        """A slot for a chunk, after evicting what must go; None where everything is held."""
        if blocks > self.budget_blocks:
            return None
        if self.can_punch:
            return self._reserve_and_punch(blocks)
        return self._reserve_in_place(blocks)

    def _reserve_and_punch(self, blocks: int) -> Reservation | None:
        slot = self._free_slot()
        if slot < 0:
            return None
        punches: list[int] = []
        while self.used_blocks - self._occupied[slot] + blocks > self.budget_blocks:
            other = next(iter(self._dirty), -1)
            self._dirty.pop(other, None)
            if other < 0:
                other = self._evict()
            if other < 0:
                self._give_back(slot)
                for kept in punches:
                    self.punched(kept, given_back=False)
                return None
            self.blocks[other] = self._occupied[other]
            self._vacate(other)
            self.states[other] = SlotState.PUNCHING
            punches.append(other)
        return self._reserved(slot, blocks, blocks, punches)

    def _reserve_in_place(self, blocks: int) -> Reservation | None:
        """Where blocks never come back from the file system: use slots that have some again."""
        if blocks - max(self._occupied) > self.budget_blocks - self.used_blocks:
            return None  # however much were evicted, no slot would be large enough
        while True:
            slot = max(self._dirty, key=self._occupied.__getitem__, default=-1)
            if slot >= 0:
                after = max(self._occupied[slot], blocks)
                if self.used_blocks - self._occupied[slot] + after <= self.budget_blocks:
                    del self._dirty[slot]
                    return self._reserved(slot, blocks, after, [])
            slot = self._free_slot() if not self._dirty else -1
            if slot >= 0 and self.used_blocks + blocks <= self.budget_blocks:
                return self._reserved(slot, blocks, blocks, [])
            if slot >= 0:
                self._give_back(slot)
            slot = self._evict()
            if slot < 0:
                return None
            self._give_back(slot)

    def _reserved(self, slot: int, blocks: int, after: int, punches: list[int]) -> Reservation:
        stale = self._occupied[slot]
        self._vacate(slot)
        self._occupy(slot, after)
        self.states[slot] = SlotState.WRITING
        self.blocks[slot] = blocks
        return Reservation(slot, blocks, stale, tuple(punches))

    def _free_slot(self) -> int:
        """A free slot, taken off its list: one that has blocks already where possible."""
        if self._dirty:
            return self._dirty.popitem()[0]
        if self._clean:
            return self._clean.pop()
        if self._fresh < self.slot_count:
            self._fresh += 1
            return self._fresh - 1
        return self._evict()

    def _evict(self) -> int:
        """Makes a victim's slot free (on no list yet); -1 where everything is held."""
        slot = self.recency.victim(self._hold, self.digest_of)
        if slot >= 0:
            self.evictions += 1
            self.wasted += self.recency.was_wasted(slot)
            self._unlist(slot)
            self.evicted.append(slot)
            self.states[slot] = SlotState.FREE
        elif self._unknown:
            slot = next(iter(self._unknown))
            del self._unknown[slot]
            self.states[slot] = SlotState.FREE
        return slot

    def _hold(self, slot: int) -> Hold:
        if self.digests[slot] in self._leases:
            return Hold.LEASED
        return Hold.PINNED if self._pins[slot] else Hold.NONE

    def commit(self, reservation: Reservation, digest: bytes, *, ahead: bool) -> None:
        """The write of a reserved slot returned: its chunk becomes visible."""
        slot = reservation.slot
        self.states[slot] = SlotState.CHECKED
        self._list(slot, digest)
        self.recency.add(slot, digest, ahead=ahead)

    def abandon(self, reservation: Reservation, *, written: bool) -> None:
        """A reserved slot is not needed: `written`, or with unknown blocks, at most all."""
        slot = reservation.slot
        if not written:
            self._vacate(slot)
            self._occupy(slot, max(reservation.blocks, reservation.stale_blocks))
        self._give_back(slot)

    def punched(self, slot: int, *, given_back: bool) -> None:
        """The blocks of a free slot went back to the file system, or could not."""
        if not given_back:
            self._occupy(slot, self.blocks[slot])
        self._give_back(slot)

    # --- dropping

    def drop(self, slot: int, *, lost: bool = False) -> None:
        """A chunk must not be shown again; `lost`: nor its slot be used."""
        if self.states[slot] not in _PRESENT:
            return
        self.recency.forget(slot)
        self._unlist(slot)
        self.states[slot] = SlotState.LOST if lost else SlotState.DOOMED
        if not lost and not self._pins[slot]:
            self._give_back(slot)

    def trust(self, slot: int) -> None:
        """An unchecked slot's bytes matched its digest."""
        if self.states[slot] == SlotState.UNCHECKED:
            self.states[slot] = SlotState.CHECKED
            self.unchecked -= 1

    def distrust_all(self) -> None:
        """Somebody tampered with the file: nothing is shown before it is checked again."""
        for slot in self._slot_of.values():
            if self.states[slot] == SlotState.CHECKED:
                self.states[slot] = SlotState.UNCHECKED
                self.unchecked += 1
                self._next_serial(slot)

    # --- pins and leases

    def pin(self, slot: int) -> None:
        """Somebody reads or sends the slot's bytes."""
        if not self._pins[slot]:
            self.pinned += 1
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """The inverse of `pin`."""
        self._pins[slot] -= 1
        if not self._pins[slot]:
            self.pinned -= 1
            if self.states[slot] == SlotState.DOOMED:
                self._give_back(slot)

    def lease(self, digests: Iterable[bytes], weight: int) -> None:
        """Content that stays, present already or not; `weight` bytes of it."""
        self.leased_bytes += weight
        for digest in digests:
            self._leases[digest] = self._leases.get(digest, 0) + 1

    def unlease(self, digests: Iterable[bytes], weight: int) -> None:
        """The inverse of `lease`."""
        self.leased_bytes -= weight
        for digest in digests:
            count = self._leases.pop(digest)
            if count > 1:
                self._leases[digest] = count - 1
        self.recency.release_held()

    @property
    def leased(self) -> int:
        """How many chunks are leased, present or not."""
        return len(self._leases)

    # --- what an earlier run left

    def restore(self, rows: Iterable[tuple[int, bytes, int]]) -> None:
        """Takes an index's rows (slot, digest, blocks), but those that cannot be."""
        # A million rows must not take seconds: columns are locals, and nothing is called per row.
        states, sizes, occupied = self.states, self.blocks, self._occupied
        digests, slot_of, slots = self.digests, self._slot_of, array("I")
        total, limit, free = 0, self.slot_count, SlotState.FREE.value
        unchecked = SlotState.UNCHECKED.value
        for slot, digest, blocks in rows:
            if not 0 <= slot < limit or not 0 < blocks <= MAX_CHUNK_BLOCKS:
                continue
            if states[slot] != free or digest in slot_of:
                continue
            states[slot] = unchecked
            sizes[slot] = occupied[slot] = blocks
            slot_of[digest] = slot
            digests[slot] = digest
            total += blocks
            slots.append(slot)
        self.used_blocks += total
        self.unchecked += len(slots)
        self.recency.settle(slots)

    def restore_unknown(self, slot: int, blocks: int) -> None:
        """A slot that holds data which no index names."""
        if self.states[slot] == SlotState.FREE:
            self.states[slot] = SlotState.UNKNOWN
            self._occupy(slot, blocks)
            self._unknown[slot] = None

    def restored(self) -> list[tuple[int, int]]:
        """Ends restoring: frees what is left, and says which runs [start, end) hold no chunk."""
        runs = [match.span() for match in re.finditer(b"\\x00+", self.states)]
        tail = runs[-1] if runs and runs[-1][1] == self.slot_count else None
        self._fresh = tail[0] if tail else self.slot_count
        for start, end in runs:
            if start < self._fresh:
                self._clean.extend(range(start, end))
        while self.can_punch and self.used_blocks > self.budget_blocks:
            slot = self._evict()
            if slot < 0:
                break
            self._vacate(slot)  # the caller punches these too
            runs.append((slot, slot + 1))
            self._clean.append(slot)
        return runs

    def next_unknown(self) -> tuple[int, int] | None:
        """(slot, blocks) that recovery should look at; the slot is pinned by being taken out."""
        slot = next(iter(self._unknown), None)
        if slot is None:
            return None
        del self._unknown[slot]
        self.states[slot] = SlotState.WRITING
        return slot, self._occupied[slot]

    def recovered(self, slot: int, digest: bytes | None, blocks: int) -> bool:
        """What recovery found in a slot: a chunk (True where it was new), or nothing of use."""
        if digest is None or digest in self._slot_of:
            self._give_back(slot)
            return False
        self.states[slot] = SlotState.CHECKED
        self.blocks[slot] = blocks
        self._list(slot, digest)
        self.recency.add(slot, digest, ahead=False)
        return True

    # --- accounting: the only functions that change what is occupied, but for `restore`

    def _occupy(self, slot: int, blocks: int) -> None:
        self._occupied[slot] = blocks
        self.used_blocks += blocks

    def _vacate(self, slot: int) -> None:
        self.used_blocks -= self._occupied[slot]
        self._occupied[slot] = 0

    def check(self) -> None:
        """AssertionError where the sums, lists and states do not agree; for tests and scrubs."""
        faults: list[str] = []
        if sum(self._occupied) != self.used_blocks:
            faults.append(f"{sum(self._occupied)} blocks occupied, {self.used_blocks} counted")
        present = {s for s in range(self.slot_count) if self.states[s] in _PRESENT}
        if present != set(self._slot_of.values()) or len(present) != len(self._slot_of):
            faults.append("the states of slots and the table of chunks differ")
        if any(self._slot_of.get(self.digest_of(slot)) != slot for slot in present):
            faults.append("a slot and the table of chunks name different chunks")
        free = {s for s in range(self._fresh) if self.states[s] == SlotState.FREE}
        if free != set(self._clean) | set(self._dirty) or set(self._clean) & set(self._dirty):
            faults.append("the free lists are not the free slots")
        if any(self._occupied[s] for s in self._clean):
            faults.append("a slot listed as clean occupies blocks")
        if self.unchecked != sum(self.states[s] == SlotState.UNCHECKED for s in present):
            faults.append("the count of unchecked slots is wrong")
        if len(self.recency) != len(present):
            faults.append("eviction knows other slots than the table")
        if self.pinned != sum(1 for pins in self._pins if pins):
            faults.append("the count of pinned slots is wrong")
        if faults:
            raise AssertionError("; ".join(faults))

    # --- inner steps

    def _list(self, slot: int, digest: bytes) -> None:
        self._slot_of[digest] = slot
        self.digests[slot] = digest
        self._next_serial(slot)

    def _unlist(self, slot: int) -> None:
        del self._slot_of[self.digest_of(slot)]
        self.digests[slot] = None
        if self.states[slot] == SlotState.UNCHECKED:
            self.unchecked -= 1
        self._next_serial(slot)

    def _next_serial(self, slot: int) -> None:
        self.serials[slot] = (self.serials[slot] + 1) % NO_SERIAL

    def _give_back(self, slot: int) -> None:
        self.states[slot] = SlotState.FREE
        if self._occupied[slot]:
            self._dirty[slot] = None
        else:
            self._clean.append(slot)
