"""Control calls are counted; what was found out about a bucket is found out once a day."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kits.s3_servers import S3Server
from kits.store_contract import StoreContract, Subject

from imagecache.errors import NotFound, Unavailable
from imagecache.store.counters import ReadCounters
from imagecache.store.faults import FaultStore, Script
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.metered import MeteredStore
from imagecache.store.open import open_store
from imagecache.store.remembered import MAX_AGE_S, Remembered
from imagecache.store.settings import StoreSettings


class TestMeteredStore(StoreContract):
    """G: counting changes no answer."""

    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        inner = MemoryStore()

        async def seed(key: str, body: bytes) -> None:
            await inner.put(key, body)

        async def peek(key: str) -> bytes | None:
            return inner.objects.get(key)

        metered = MeteredStore(inner, ReadCounters().control)
        yield Subject(metered, MemoryReader(inner), seed, peek)


async def test_calls_bytes_and_failures_are_counted_by_kind(tmp_path: Path) -> None:
    counters = ReadCounters()
    store = MeteredStore(MemoryStore(), counters.control)
    await store.put("r/x", b"12345")
    assert not await store.put("r/x", b"1234567", only_if_absent=True)
    await store.get("r/x", limit=9)
    await store.stat("r/x")
    for _ in range(2):
        assert [found.key async for found in store.list("r/")] == ["r/x"]
    await store.delete("r/x")
    with pytest.raises(NotFound):
        await store.get("r/x", limit=9)
    counted = {name: (c.requests, c.bytes, c.errors) for name, c in counters.control.items()}
    assert counted == {
        "put": (2, 5, 0), "get": (2, 5, 0), "stat": (1, 0, 0), "list": (2, 0, 0),
        "delete": (1, 0, 0),
    }  # fmt: skip
    assert counters.control["list"].times.count == 2
    broken = MeteredStore(FaultStore(MemoryStore(), Script("ee")), counters.control)
    with pytest.raises(Unavailable):
        await broken.stat("r/x")
    with pytest.raises(Unavailable):
        [found async for found in broken.list("r/")]
    assert counters.control["stat"].errors == counters.control["list"].errors == 1
    assert counters.snapshot()["control"]["stat"]["requests"] == 2  # type: ignore[index] # JSON


async def test_conditional_puts_are_probed_once_a_day_and_host(
    moto: S3Server, aws_keys: None, tmp_path: Path
) -> None:
    """G13: the second builder of a host asks nothing; a day later, or for doctor, it is asked."""
    settings = StoreSettings(remember_in=tmp_path / "stores")

    async def puts() -> int:
        """Puts that one claim of a new process costs."""
        opened = open_store(moto.url("remembered"), settings)
        before = len(asked)
        assert await opened.store.claims_are_atomic()
        await opened.close()
        return len(asked) - before

    asked: list[str] = []
    found = Remembered(tmp_path / "stores")
    real = found.save

    def counted(store: str, question: str, answer: bool) -> None:
        asked.append(question)
        real(store, question, answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Remembered, "save", lambda self, *answer: counted(*answer)
        )  # only an answer that was asked for is saved
        assert await puts() == 1
        assert await puts() == 0
        (file,) = (tmp_path / "stores").iterdir()
        os.utime(file, (1, 1))
        assert await puts() == 1
        file.write_bytes(b"[")
        assert await puts() == 1
        assert MAX_AGE_S <= 86_400


def test_what_cannot_be_kept_is_asked_again(tmp_path: Path) -> None:
    """A missing or read-only state directory is no error, and is not made here."""
    remembered = Remembered(tmp_path / "absent" / "stores")
    remembered.save("s3://b", "q", True)
    assert remembered.load("s3://b", "q") is None
    assert not (tmp_path / "absent").exists()
    kept = Remembered(tmp_path / "stores")
    kept.save("s3://b", "q", False)
    assert kept.load("s3://b", "q") is False
    assert kept.load("s3://b", "other") is None
    assert kept.load("s3://c", "q") is None
    assert Remembered(None).load("s3://b", "q") is None
