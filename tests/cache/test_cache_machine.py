"""The arena against a dict: any order of admissions, evictions, damage and restarts."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kits.until import until

from imagecache.cache.arena import Arena
from imagecache.cache.lease import Lease
from imagecache.cache.settings import ArenaSettings, Integrity
from imagecache.cache.slotfile import SLOT_BYTES
from imagecache.chunks import BLOCK, chunk_digest

CHUNKS = [random.Random(n).randbytes(BLOCK * (1 + n * 7 % 64)) for n in range(40)]
DIGESTS = [chunk_digest(chunk) for chunk in CHUNKS]
BUDGET = 2 << 20
numbers = st.integers(0, len(CHUNKS) - 1)


class ArenaMachine(RuleBasedStateMachine):
    """`kept` is the model: chunks that must be there, because they are pinned or leased."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="arena-machine"))
        self.policy = Integrity.ADMISSION
        self.pins: dict[int, list[int]] = {}
        self.leases: list[tuple[frozenset[int], Lease]] = []
        self.damaged: set[int] = set()
        self.arena = self.open()

    def open(self) -> Arena:
        chosen = ArenaSettings(
            BUDGET, integrity=self.policy, overcommit=2, scrub_bytes_per_second=0
        )
        return self.loop.run_until_complete(Arena.open(self.directory, chosen))

    def run(self, awaitable):
        return self.loop.run_until_complete(awaitable)

    @rule(batch=st.lists(numbers, min_size=1, max_size=6), ahead=st.booleans())
    def admit(self, batch: list[int], ahead: bool) -> None:
        here = {n for n in range(len(CHUNKS)) if self.arena.holds(DIGESTS[n])}
        kept = self.run(self.arena.admit([(DIGESTS[n], CHUNKS[n]) for n in batch], ahead=ahead))
        assert kept <= len(batch)
        self.damaged -= {n for n in batch if n not in here}
        if not self.pins and not self.leases:
            assert self.arena.holds(DIGESTS[batch[-1]])

    @rule(number=numbers)
    def copy(self, number: int) -> None:
        copy = self.run(self.arena.copy(DIGESTS[number]))
        assert copy in (None, CHUNKS[number])
        if copy is not None:
            assert number not in self.damaged
        self.damaged.discard(number)

    @rule(number=numbers)
    def touch(self, number: int) -> None:
        slot = self.arena.table.find(DIGESTS[number])
        if slot >= 0:
            self.arena.table.recency.touched[slot] = self.arena.table.recency.tick

    @rule(number=numbers, offset=st.integers(0, BLOCK * 64), length=st.integers(1, 9000))
    def look(self, number: int, offset: int, length: int) -> None:
        slot = self.arena.table.checked(DIGESTS[number])
        part = CHUNKS[number][offset : offset + length]
        if slot < 0 or not part:
            return
        found = self.arena.peek(slot, offset, len(part))
        assert found is None or bytes(found) == part

    @rule()
    def tick(self) -> None:
        self.arena.table.recency.advance()

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        slot = self.arena.table.find(DIGESTS[number])
        if slot >= 0:
            self.arena.table.pin(slot)
            self.pins.setdefault(number, []).append(slot)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        number = data.draw(st.sampled_from(sorted(self.pins)))
        self.arena.table.unpin(self.pins[number].pop())
        if not self.pins[number]:
            del self.pins[number]

    @rule(batch=st.frozensets(numbers, max_size=5))
    def lease(self, batch: frozenset[int]) -> None:
        if sum(len(CHUNKS[n]) for n in batch) < BUDGET // 3:
            self.leases.append((batch, self.arena.lease(DIGESTS[n] for n in batch)))

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.leases.pop(0)[1].release()

    @rule(number=numbers, where=st.integers(0, BLOCK - 1))
    def damage(self, number: int, where: int) -> None:
        slot = self.arena.table.find(DIGESTS[number])
        if slot >= 0 and number not in self.damaged:
            at = slot * SLOT_BYTES + where
            byte = os.pread(self.arena.file.fd, 1, at)[0]
            os.pwrite(self.arena.file.fd, bytes([byte ^ 255]), at)
            self.damaged.add(number)

    @rule(policy=st.sampled_from(list(Integrity)), lose_index=st.booleans())
    def restart(self, policy: Integrity, lose_index: bool) -> None:
        if self.damaged and lose_index:
            return  # damaged bytes would be found again under the digest of what they are now
        self.pins, self.policy = {}, policy
        for _, lease in self.leases:
            lease.release()
        self.leases = []
        before = self.arena.stats().chunks
        self.run(self.arena.close())
        if lose_index:
            for path in self.directory.glob("index.db*"):
                path.unlink()
        self.arena = self.open()
        if lose_index:
            self.run(until(lambda: self.arena.stats().chunks >= before, f"{before} chunks"))
        assert self.arena.stats().chunks == before

    @invariant()
    def the_books_balance(self) -> None:
        self.arena.table.check()
        assert self.arena.table.used_blocks * BLOCK <= BUDGET
        for number, slots in self.pins.items():
            here = self.arena.table.find(DIGESTS[number])
            assert here in slots or number not in self.damaged or here == -1

    def teardown(self) -> None:
        self.run(self.arena.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)


TestArenaMachine = ArenaMachine.TestCase
# A failure is printed as it was found: making it smaller takes minutes of real disk work, and a
# timeout that comes meanwhile counts for hypothesis as one failure more, and ends nothing.
TestArenaMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
)
