"""The log of a start: first touches exactly, bounded memory, and when it is over."""

import random

import pytest

from imagecache.cache.events import Cause, Wait
from imagecache.chunks import BLOCK
from imagecache.profile import recorder
from imagecache.profile.calm import Calm, CalmRule
from imagecache.profile.recorder import StartLog

pytestmark = pytest.mark.quick


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def wait(begin: float) -> Wait:
    return Wait(begin, 0.1, 0, BLOCK, 1, Cause.COLD, None)


def test_each_block_is_logged_once_in_the_order_of_reading() -> None:
    """Random reads against the plainest possible model."""
    rng = random.Random(3)
    log = StartLog(Clock())
    seen: dict[int, None] = {}
    for _ in range(2000):
        offset = rng.randrange(4000 * BLOCK)
        length = rng.choice((1, 512, BLOCK, 8 * BLOCK, 300 * BLOCK))
        log.reads([(offset, length, rng.random() < 0.5)])
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            seen.setdefault(block)
    found = [b for r in log.first_reads() for b in range(r.start_block, r.start_block + r.blocks)]
    assert found == list(seen)
    assert log.touched_blocks == len(seen)


def test_memory_is_bounded_on_an_export_that_reads_for_ever() -> None:
    log = StartLog(Clock())
    for number in range(recorder.MAX_TOUCHES + 500):
        log.reads([(number * 2 * BLOCK, BLOCK, True)])
        log.waited(wait(float(number)))
    assert len(list(log.first_reads())) == recorder.MAX_TOUCHES
    assert log.dropped_touches == 500
    assert len(log.waits) == recorder.MAX_WAITS
    assert len(log.last_waits) == 512
    assert log.waits[0].begin == 0.0
    assert log.last_waits[-1].begin == recorder.MAX_TOUCHES + 499


def test_after_the_end_only_totals_are_kept() -> None:
    log = StartLog(Clock())
    log.reads([(0, BLOCK, True)])
    log.end()
    log.reads([(BLOCK, BLOCK, True), (2 * BLOCK, BLOCK, True)])
    assert log.reads_total == 3
    assert [r.start_block for r in log.first_reads()] == [0]


def test_an_export_that_nobody_reads_has_not_started() -> None:
    assert StartLog(Clock()).ends_at() is None


def test_a_start_is_over_when_nothing_new_was_read_for_a_while() -> None:
    clock = Clock()
    log = StartLog(clock, CalmRule(least=2.0))
    log.reads([(0, 1 << 20, False)])
    assert log.ends_at() == 102.0
    clock.now = 101.5
    log.reads([(0, 1 << 20, True)])  # the same blocks again are nothing new
    assert log.ends_at() == 102.0
    log.reads([(1 << 20, 1 << 20, True)])
    assert log.ends_at() == 103.5


def test_a_long_start_is_given_a_longer_silence() -> None:
    """A program that loads for 20 seconds also computes for some between two reads."""
    calm = Calm(CalmRule(least=2.0, most=20.0, share=0.5))
    calm.touched(0.0, 1 << 20)
    calm.touched(20.0, 1 << 20)
    assert calm.ends_at() == 30.0


def test_a_trickle_does_not_keep_a_start_open() -> None:
    """Something that reads a new block now and then, for ever, as a log file's reader does."""
    calm = Calm(CalmRule(least=2.0, trickle_bytes=64 << 10))
    calm.touched(0.0, 1 << 20)
    for second in range(1, 60):
        calm.touched(float(second), BLOCK)
    assert calm.ends_at() == 2.0


def test_a_recording_ends_at_its_limit_however_much_is_read() -> None:
    calm = Calm(CalmRule(limit=10.0))
    for step in range(200):
        calm.touched(step / 10, 1 << 20)
    assert calm.ends_at() == 10.0


def test_the_probes_before_a_slow_boot_do_not_end_a_start() -> None:
    """A disk is attached and probed, and the machine boots for half a minute before it mounts."""
    calm = Calm(CalmRule(least=2.0, limit=120.0))
    calm.touched(0.0, 4096)
    assert calm.ends_at() == 120.0
    calm.touched(30.0, 200_000)
    assert calm.ends_at() == 45.0
