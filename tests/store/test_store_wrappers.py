"""Retry, limits, hedges, tier and metering over scripted readers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from imagecache.errors import Denied, NotFound, Unavailable
from imagecache.store.base import Priority, RangePastEnd, Throttled
from imagecache.store.counters import ReadCounters
from imagecache.store.faults import FaultReader, FaultStore, Script
from imagecache.store.hedge import HedgedReader
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.policy import RetryBudget, RetryPolicy, parse_retry_after
from imagecache.store.retry import RetryReader, RetryStore
from imagecache.store.tier import TieredReader
from imagecache.store.wrappers import MIN_WINDOW, LimitedReader, MeteredReader

pytestmark = pytest.mark.quick

DEMAND, PREFETCH, FILL = Priority
BODY = random.Random(6).randbytes(10_000)
LONG = dict.fromkeys(Priority, 60.0)
PLACES = {DEMAND: 4, PREFETCH: 2, FILL: 2}


class Origin:
    """A reader whose every call is a test's function."""

    def __init__(self, call: Callable[[int, Priority], Awaitable[bytes]]) -> None:
        self.call = call
        self.calls = 0
        self.condemned: list[str] = []

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        self.calls += 1
        return await self.call(self.calls, priority)

    def condemn(self, key: str) -> None:
        self.condemned.append(key)

    async def close(self) -> None:
        pass


def faulty(letters: str) -> FaultReader:
    store = MemoryStore()
    store.objects["r/pack"] = BODY
    return FaultReader(MemoryReader(store), Script(letters))


class Sleeps:
    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def retrying(reader: FaultReader, sleeps: Sleeps, **named: object) -> RetryReader:
    policy = RetryPolicy(attempts=4, base_s=0.1, cap_s=1.0, retry_after_cap_s=5.0)
    return RetryReader(
        reader,
        policy,
        LONG,
        ReadCounters().origin,
        dice=random.Random(7),
        sleep=sleeps,
        **named,  # type: ignore[arg-type]
    )


async def test_retries_mask_passing_faults() -> None:
    """G1, G6: errors, throttling, protocol faults and an early 404 are tried again with jitter."""
    for letters in ("e.", "t.", "p.", "n.", "etp.", "nn."):
        sleeps = Sleeps()
        got = await retrying(faulty(letters), sleeps).read("r/pack", 5, 50, priority=DEMAND)
        assert got == BODY[5:55]
        assert len(sleeps.slept) == len(letters) - 1
        assert all(0 <= seconds <= 0.1 * 2**n for n, seconds in enumerate(sleeps.slept, 1))


async def test_what_is_not_retried() -> None:
    """G11: a refusal is final; a 404 and a range past the end are after three attempts."""
    for letters, error, asked in [
        ("d.", Denied, 1),
        ("nnn.", NotFound, 3),
        ("eeee.", Unavailable, 4),
    ]:
        reader = faulty(letters)
        with pytest.raises(error):
            await retrying(reader, Sleeps()).read("r/pack", 5, 50, priority=DEMAND)
        assert reader._script.calls == asked
    reader = faulty("")
    with pytest.raises(RangePastEnd):
        await retrying(reader, Sleeps()).read("r/pack", 9_999, 2, priority=DEMAND)
    assert reader._script.calls == 3


async def test_retry_after_is_obeyed_up_to_its_cap() -> None:
    """G1, A8: Retry-After adds to the jitter, and 10^9 seconds do not hang a read."""
    for said, least, most in [(2.0, 2.0, 2.2), (1e9, 5.0, 5.2), (-4.0, 0.0, 0.2)]:

        async def call(number: int, priority: Priority, said: float = said) -> bytes:
            if number == 1:
                raise Throttled("slow down", retry_after=said)
            return b"x"

        sleeps = Sleeps()
        assert await retrying(Origin(call), sleeps).read("r/pack", 0, 1, priority=FILL) == b"x"
        assert least <= sleeps.slept[0] <= most


async def test_a_read_ends_by_its_deadline() -> None:
    """G16: whatever hangs below, the class's deadline ends it with Unavailable."""
    reader = RetryReader(
        faulty("h"), RetryPolicy(), dict.fromkeys(Priority, 0.05), ReadCounters().origin
    )
    with pytest.raises(Unavailable, match=r"within 0\.05 s"):
        await reader.read("r/pack", 0, 10, priority=DEMAND)


async def test_the_budget_ends_retry_storms() -> None:
    """G1: in a lasting outage the retries are a share of the reads, not a multiple."""
    script = faulty("e" * 10_000)
    reader = retrying(script, Sleeps(), budget=RetryBudget(ratio=0.1, capacity=10))
    for _ in range(500):
        with pytest.raises(Unavailable):
            await reader.read("r/pack", 0, 1, priority=DEMAND)
    assert 500 <= script._script.calls <= 500 * 1.1 + 10


async def test_cancelling_is_not_retried() -> None:
    reader = retrying(faulty("h"), Sleeps())
    task = asyncio.create_task(reader.read("r/pack", 0, 1, priority=DEMAND))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_window_halves_and_recovers() -> None:
    """G1: throttling halves the window, once for what was sent together; success restores it."""
    now = 0.0
    throttle = True

    async def call(number: int, priority: Priority) -> bytes:
        if throttle:
            raise Throttled("slow down")
        return b"x"

    reader = LimitedReader(
        Origin(call), dict.fromkeys(Priority, 32), ReadCounters().origin, clock=lambda: now
    )
    assert reader.window == 96
    for expected in (48, 24, 12, 6, MIN_WINDOW, MIN_WINDOW):
        now += 1
        answers = await asyncio.gather(
            *[reader.read("k", 0, 1, priority=DEMAND) for _ in range(4)], return_exceptions=True
        )
        assert all(isinstance(answer, Throttled) for answer in answers)
        assert reader.window == expected
    throttle = False
    for _ in range(6000):
        await reader.read("k", 0, 1, priority=DEMAND)
    assert reader.window == 96


async def test_demand_never_waits_for_fill() -> None:
    """Demand passes while fill and prefetch fill their places, even in the smallest window."""
    gates: list[asyncio.Future[bytes]] = []

    async def call(number: int, priority: Priority) -> bytes:
        if priority is DEMAND:
            return b"d"
        gates.append(asyncio.get_running_loop().create_future())
        return await gates[-1]

    reader = LimitedReader(Origin(call), PLACES, ReadCounters().origin)
    reader._window = MIN_WINDOW
    rest = [
        asyncio.create_task(reader.read("k", 0, 1, priority=priority))
        for priority in (FILL, PREFETCH)
        for _ in range(5)
    ]
    await asyncio.sleep(0)
    assert len(gates) == 4
    for _ in range(10):
        assert await reader.read("k", 0, 1, priority=DEMAND) == b"d"
    for _ in range(1000):
        if all(task.done() for task in rest):
            break
        for gate in gates:
            if not gate.done():
                gate.set_result(b"r")
        await asyncio.sleep(0)
    assert reader._busy == [0, 0, 0]


async def test_places_survive_random_cancelling() -> None:
    """No place is lost or doubled, however waiters and holders are cancelled."""
    dice = random.Random(8)
    most = [0, 0, 0]
    busy = [0, 0, 0]

    async def call(number: int, priority: Priority) -> bytes:
        busy[priority] += 1
        most[priority] = max(most[priority], busy[priority])
        try:
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
        finally:
            busy[priority] -= 1
        return b"x"

    reader = LimitedReader(Origin(call), PLACES, ReadCounters().origin)
    tasks: list[asyncio.Task[bytes]] = []
    for _ in range(3000):
        priority = dice.choice(list(Priority))
        tasks.append(asyncio.create_task(reader.read("k", 0, 1, priority=priority)))
        if dice.random() < 0.5:
            await asyncio.sleep(0)
        if dice.random() < 0.4:
            dice.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert reader._busy == [0, 0, 0]
    assert [len(waiting) for waiting in reader._waiting] == [0, 0, 0]
    assert most == [PLACES[priority] for priority in Priority]


class Racing:
    """An origin with quick answers and slow ones; `slow` numbers hang until released."""

    def __init__(self) -> None:
        self.slow: set[int] = set()
        self.failing: set[int] = set()
        self.cancelled = 0
        self.release = asyncio.Event()

    async def __call__(self, number: int, priority: Priority) -> bytes:
        if number in self.slow:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if number in self.failing:
            raise Unavailable("scripted")
        return b"%d" % number


async def hedged(racing: Racing) -> tuple[HedgedReader, Origin, ReadCounters]:
    counters = ReadCounters()
    origin = Origin(racing)
    reader = HedgedReader(origin, counters.origin)
    for _ in range(160):
        await reader.read("k", 0, 1, priority=DEMAND)
    return reader, origin, counters


async def test_a_slow_read_is_hedged() -> None:
    """G17: after the p95 a second read is sent; its answer is used and the first is cancelled."""
    racing = Racing()
    reader, _, counters = await hedged(racing)
    racing.slow = {161}
    assert await reader.read("k", 0, 1, priority=DEMAND) == b"162"
    assert racing.cancelled == 1
    assert (counters.origin[DEMAND].hedges, counters.origin[DEMAND].hedges_won) == (1, 1)


async def test_the_first_of_a_hedged_pair_may_win_or_fail() -> None:
    """G17: the first may win; where it fails its twin is awaited; both failing is one error."""
    racing = Racing()
    reader, origin, _ = await hedged(racing)
    racing.slow = {161, 162}
    task = asyncio.create_task(reader.read("k", 0, 1, priority=DEMAND))
    while origin.calls < 162:
        await asyncio.sleep(0.001)
    racing.release.set()
    assert await task in (b"161", b"162")
    racing.release.clear()
    racing.slow, racing.failing = {163, 164}, {163}
    task = asyncio.create_task(reader.read("k", 0, 1, priority=DEMAND))
    while origin.calls < 164:
        await asyncio.sleep(0.001)
    racing.release.set()
    assert await task == b"164"
    racing.release.clear()
    racing.slow, racing.failing = {165, 166}, {165, 166}
    task = asyncio.create_task(reader.read("k", 0, 1, priority=DEMAND))
    while origin.calls < 166:
        await asyncio.sleep(0.001)
    racing.release.set()
    with pytest.raises(Unavailable):
        await task


async def test_hedges_are_at_most_five_percent() -> None:
    """G17: however many are slow, hedges stay within 5 % of the first reads; fill has none."""
    racing = Racing()
    reader, origin, counters = await hedged(racing)
    racing.slow = set(range(161, 10**6))
    tasks = [asyncio.create_task(reader.read("k", 0, 1, priority=DEMAND)) for _ in range(400)]
    tasks += [asyncio.create_task(reader.read("k", 0, 1, priority=FILL)) for _ in range(400)]
    await asyncio.sleep(0.05)
    racing.release.set()
    await asyncio.gather(*tasks)
    assert 0 < counters.origin[DEMAND].hedges <= 0.05 * 560
    assert origin.calls == 160 + 800 + counters.origin[DEMAND].hedges
    assert counters.origin[FILL].hedges == 0


async def test_cancelling_a_hedged_read_cancels_both() -> None:
    racing = Racing()
    reader, origin, _ = await hedged(racing)
    racing.slow = {161, 162}
    task = asyncio.create_task(reader.read("k", 0, 1, priority=DEMAND))
    while origin.calls < 162:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert racing.cancelled == 2


def tiered(letters: str, **named: object) -> tuple[TieredReader, FaultReader, ReadCounters]:
    counters = ReadCounters()
    tier = faulty(letters)
    reader = TieredReader(tier, faulty(""), counters, patience_s=0.05, **named)  # type: ignore[arg-type]
    return reader, tier, counters


async def test_every_fault_of_the_tier_is_the_origins_to_answer() -> None:
    """L1: a tier that fails, refuses, forgets or hangs costs a fall-back, never an error."""
    for letter in "etdnph":
        reader, tier, counters = tiered(letter + ".")
        for _ in range(2):
            assert await reader.read("r/pack", 5, 50, priority=DEMAND) == BODY[5:55]
        assert counters.tier_fallbacks == 1
        assert tier._script.calls == 2


async def test_a_failing_tier_rests_and_is_tried_again() -> None:
    """L1: after three failures the tier is left alone for a while, then one read tries it."""
    now = 0.0
    reader, tier, _ = tiered("eeee.", clock=lambda: now)
    asked = []
    for _ in range(6):
        await reader.read("r/pack", 0, 1, priority=DEMAND)
        asked.append(tier._script.calls)
    assert asked == [1, 2, 3, 3, 3, 3]
    now = 1.5
    for _ in range(3):
        await reader.read("r/pack", 0, 1, priority=DEMAND)
    assert tier._script.calls == 4
    now = 10.0
    for _ in range(3):
        await reader.read("r/pack", 0, 1, priority=DEMAND)
    assert tier._script.calls >= 5


async def test_wrong_bytes_from_the_tier() -> None:
    """L1: what the caller condemns is read from the origin, and the tier is scored down."""
    now = 0.0
    reader, tier, counters = tiered("fff" + "." * 99, clock=lambda: now)
    wrong = await reader.read("r/pack", 5, 50, priority=DEMAND)
    assert wrong != BODY[5:55]
    reader.condemn("r/pack")
    for _ in range(5):
        assert await reader.read("r/pack", 5, 50, priority=DEMAND) == BODY[5:55]
    assert tier._script.calls == 1
    assert counters.condemned == 1
    for number in range(2):
        reader.condemn(f"r/other{number}")
    assert not reader._usable("r/third")
    now = 700.0
    assert reader._usable("r/pack")


async def test_metering() -> None:
    counters = ReadCounters()
    reader = MeteredReader(faulty(".te"), counters.origin)
    await reader.read("r/pack", 0, 100, priority=PREFETCH)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await reader.read("r/pack", 0, 100, priority=PREFETCH)
    got = counters.origin[PREFETCH]
    assert (got.requests, got.bytes, got.errors, got.throttled) == (3, 100, 2, 1)
    snapshot = counters.snapshot()
    assert snapshot["origin"]["prefetch"]["bytes"] == 100  # type: ignore[index]


def test_retry_after_texts() -> None:
    """A8: numbers, dates, and everything else."""
    assert parse_retry_after("5", 0) == 5
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 30.0) == 30
    assert parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 90.0) == 0
    for text in (None, "", "soon", "-3", "1e9", "٣", "x" * 1000, "Thu, 99 Jan 1970 00:01:00 GMT"):
        assert parse_retry_after(text, 0) is None


def retry_store(letters: str) -> tuple[RetryStore, FaultStore, MemoryStore]:
    memory = MemoryStore()
    faults = FaultStore(memory, Script(letters))
    return RetryStore(faults, RetryPolicy(attempts=4), sleep=Sleeps()), faults, memory


async def test_control_calls_are_retried() -> None:
    """G1: passing faults of every verb are masked; lasting ones and refusals come out."""
    store, _, memory = retry_store("et." + "l." + "ete." + "e." + "eeee" + "d")
    assert await store.put("r/x", b"x") is True
    assert await store.put("r/y", b"y") is True
    assert await store.get("r/x", limit=1) == b"x"
    assert (await store.stat("r/x")).size == 1
    with pytest.raises(Unavailable):
        await store.delete("r/x")
    with pytest.raises(Denied):
        await store.delete("r/x")
    assert memory.objects.keys() == {"r/x", "r/y"}


async def test_a_lost_answer_to_a_claim_is_resolved() -> None:
    """G8: a claim whose answer was lost is ours if our body is there, another's if not."""
    store, _, _ = retry_store("l")
    assert await store.put("r/claim", b"me", only_if_absent=True) is True
    store, _, memory = retry_store("e")
    memory.objects["r/claim"] = b"it"
    assert await store.put("r/claim", b"me", only_if_absent=True) is False
    store, _, memory = retry_store("e")
    memory.objects["r/claim"] = b"somebody"
    assert await store.put("r/claim", b"me", only_if_absent=True) is False


async def test_a_404_just_after_our_put_is_retried() -> None:
    """G6: a store that lags behind our own put is asked again; for foreign keys a 404 is a 404."""
    store, faults, _ = retry_store(".nn.")
    await store.put("r/x", b"x")
    assert await store.get("r/x", limit=1) == b"x"
    with pytest.raises(NotFound):
        await store.get("r/foreign", limit=1)
    assert faults._script.calls == 5
    await store.delete("r/x")
    with pytest.raises(NotFound):
        await store.stat("r/x")
