"""Bounds of bytes a second, alone, one below another, and shared."""

import asyncio

import pytest

from imagecache.oci import throttle as module
from imagecache.oci.throttle import Throttle

pytestmark = pytest.mark.quick


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, though none pass."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return slept


async def test_takers_of_one_bound_wait_for_each_other(asked: list[float]) -> None:
    throttle = Throttle(lambda: 1000)
    for _ in range(4):
        await throttle.take(500)
    assert [round(seconds, 1) for seconds in asked] == [0.0, 0.5, 1.0, 1.5]


async def test_the_lowest_bound_counts_and_none_is_none(asked: list[float]) -> None:
    rates = {"above": 100, "own": 0}
    above = Throttle(lambda: rates["above"])
    own = Throttle(lambda: rates["own"], above=above)
    assert (own.rate, own.seconds_for(1000)) == (100, 10)
    rates["own"] = 50
    assert (own.rate, own.seconds_for(1000)) == (50, 20)
    rates["above"] = rates["own"] = 0
    assert (own.rate, own.seconds_for(1000)) == (0, 0)
    await asyncio.gather(*(own.take(1 << 30) for _ in range(3)))
    assert asked == []
