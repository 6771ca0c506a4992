"""What to evict: a small probationary queue before a large one, and a memory of what was evicted.

The idea is S3-FIFO's: most chunks of a scan are used once, so new ones stand in a small queue and
must be used again, later, to reach the main queue; what was evicted and comes back goes there at
once. "Later" is counted in ticks, because the sixty-four 4 KiB reads that one pass makes of a chunk
are one use. Pure state, no clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import Enum

TICKS = 255  # tick values are 1..255 and wrap; 0 means never
LATER = 2  # ticks between a chunk's admission and a use that counts as another one
SMALL_SHARE = 10  # the probationary queue's share of the budget is one part in this many
_SLOT_BITS = 32


class Hold(Enum):
    """Whether a slot may be evicted: now, soon (it is being read or sent), or not while leased."""

    NONE = 0
    PINNED = 1
    LEASED = 2


class SlotQueue:
    """A first-in first-out queue of marked slots in a packed array."""

    def __init__(self) -> None:
        self._entries = array("Q")
        self._head = 0

    def __len__(self) -> int:
        return len(self._entries) - self._head

    def push(self, slot: int, mark: int) -> None:
        """Appends a slot under a mark that tells live entries from stale ones."""
        self._entries.append(mark << _SLOT_BITS | slot)

    def extend(self, entries: array[int]) -> None:
        """Appends many entries that are packed already."""
        self._entries.extend(entries)

    def pop(self) -> tuple[int, int]:
        """The oldest (slot, mark)."""
        entry = self._entries[self._head]
        self._head += 1
        if self._head > 1024 and self._head * 2 > len(self._entries):
            del self._entries[: self._head]
            self._head = 0
        return entry & 0xFFFFFFFF, entry >> _SLOT_BITS


class Recency:
    """Order of eviction over slots; `touched[slot] = tick` is all that a read has to do."""

    def __init__(self, slot_count: int, budget_blocks: int, blocks: bytearray) -> None:
        """`blocks` is the table's column of chunk sizes by slot."""
        self.touched = bytearray(slot_count)
        self.tick = 1
        self.unread = bytearray(slot_count)  # 1: fetched ahead, and no use of it seen yet
        self._admitted = bytearray(slot_count)
        self._marks = array("I", bytes(4 * slot_count))
        self._in_small = bytearray(slot_count)
        self._next_mark = 1
        self._small, self._main = SlotQueue(), SlotQueue()
        self._small_blocks = 0
        self._small_target = max(1, budget_blocks // SMALL_SHARE)
        self._blocks = blocks
        self._ghosts: dict[bytes, None] = {}
        self._set_aside: list[int] = []
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def advance(self) -> None:
        """Ends a tick: uses from now on are later than those before."""
        self.tick = self.tick % TICKS + 1

    def settle(self, slots: array[int]) -> None:
        """Chunks of the last run: they skip probation."""
        marks = self._marks
        mark = self._next_mark
        entries = array("Q")
        for slot in slots:
            marks[slot] = mark
            entries.append(mark << _SLOT_BITS | slot)
            mark += 1
        self._next_mark = mark
        self._main.extend(entries)
        self._live += len(slots)

    def add(self, slot: int, digest: bytes, *, ahead: bool) -> None:
        """A chunk became visible; `ahead`: nobody has asked for it yet."""
        self._live += 1
        self.touched[slot] = 0
        self.unread[slot] = ahead
        self._admitted[slot] = self.tick
        if digest in self._ghosts:
            self._ghosts.pop(digest, None)
            self._push_main(slot)
        else:
            self._push_small(slot)

    def was_wasted(self, slot: int) -> bool:
        """Whether a chunk was fetched ahead and never read."""
        return bool(self.unread[slot]) and not self.touched[slot]

    def forget(self, slot: int) -> None:
        """A chunk is gone for another reason than eviction."""
        if self._marks[slot]:
            self._leave(slot)
            self._marks[slot] = 0
            self._live -= 1

    def release_held(self) -> None:
        """Slots that were set aside as leased stand in line again."""
        for slot in self._set_aside:
            if self._marks[slot]:
                self._push_main(slot)
        self._set_aside.clear()

    def victim(self, hold: Callable[[int], Hold], digest_of: Callable[[int], bytes]) -> int:
        """The slot to evict next, which leaves the queues; -1 where everything is held."""
        # Each entry of the main queue is looked at twice at most: once to spend its touch.
        for _ in range(len(self._small) + 2 * (len(self._main) + len(self._small)) + 2):
            from_small = len(self._small) > 0 and (
                self._small_blocks > self._small_target or not len(self._main)
            )
            queue = self._small if from_small else self._main
            if not len(queue):
                return -1
            slot, mark = queue.pop()
            if self._marks[slot] != mark:
                continue
            held = hold(slot)
            if held is Hold.LEASED:
                self._leave(slot)
                self._mark(slot)
                self._set_aside.append(slot)
            elif from_small and self._used_again(slot):
                self._leave(slot)
                self._push_main(slot)
            elif not from_small and self.touched[slot]:
                self._push_main(slot)
            elif held is Hold.PINNED:
                self._requeue(slot, small=from_small)
            else:
                self.forget(slot)
                if from_small:
                    self._remember(digest_of(slot))
                return slot
        return -1

    def _used_again(self, slot: int) -> bool:
        touched = self.touched[slot]
        return bool(touched) and (touched - self._admitted[slot]) % TICKS >= LATER

    def _remember(self, digest: bytes) -> None:
        self._ghosts[digest] = None
        while len(self._ghosts) > max(256, min(self._live, 1 << 17)):
            del self._ghosts[next(iter(self._ghosts))]

    def _mark(self, slot: int) -> int:
        mark = self._next_mark
        self._next_mark = mark % 0xFFFFFFFF + 1
        self._marks[slot] = mark
        return mark

    def _push_small(self, slot: int) -> None:
        self._small.push(slot, self._mark(slot))
        self._in_small[slot] = 1
        self._small_blocks += self._blocks[slot]

    def _push_main(self, slot: int) -> None:
        if self.touched[slot]:
            self.unread[slot] = 0
        self.touched[slot] = 0
        self._main.push(slot, self._mark(slot))

    def _requeue(self, slot: int, *, small: bool) -> None:
        queue = self._small if small else self._main
        queue.push(slot, self._mark(slot))

    def _leave(self, slot: int) -> None:
        if self._in_small[slot]:
            self._in_small[slot] = 0
            self._small_blocks -= self._blocks[slot]
