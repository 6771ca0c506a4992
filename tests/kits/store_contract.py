"""The contract every store and range reader passes: inherit, and give a `subject` fixture."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagecache.errors import LimitExceeded, NotFound, UsageError
from imagecache.store.base import OriginProtocol, Priority, RangeReader, Store

DEMAND = Priority.DEMAND
BAD_KEYS = [
    "", "/", "a/", "/a", "a//b", "..", "a/../b", ".", "a/./b", ".tmp/x", "a b", "a\n", "a\x00",
    "é", "a%2fb", "a+b", "a\\b", "-a", "x" * 201, "/".join(["abcdefg"] * 110),
]  # fmt: skip


@dataclass
class Subject:
    """A store under test and the way round it: `seed` and `peek` do not use the store's code."""

    store: Store
    reader: RangeReader
    seed: Callable[[str, bytes], Awaitable[None]]
    peek: Callable[[str], Awaitable[bytes | None]]
    atomic: bool = True


class StoreContract:
    """Inherited tests; `subject` is a fixture of the inheriting class."""

    async def test_put_is_seen_behind_the_store(self, subject: Subject) -> None:
        assert await subject.store.put("r/packs/ab", b"hello") is True
        assert await subject.peek("r/packs/ab") == b"hello"

    async def test_get_of_what_was_seeded(self, subject: Subject) -> None:
        await subject.seed("r/packs/ab", b"seeded")
        assert await subject.store.get("r/packs/ab", limit=6) == b"seeded"

    async def test_get_over_the_limit(self, subject: Subject) -> None:
        await subject.seed("r/x", b"seven b")
        with pytest.raises(LimitExceeded, match="r/x"):
            await subject.store.get("r/x", limit=6)

    async def test_empty_object(self, subject: Subject) -> None:
        await subject.store.put("r/empty", b"")
        assert await subject.store.get("r/empty", limit=0) == b""
        assert (await subject.store.stat("r/empty")).size == 0

    async def test_put_of_a_file(self, subject: Subject, tmp_path: Path) -> None:
        body = random.Random(1).randbytes(300_001)
        source = tmp_path / "source"
        source.write_bytes(body)
        assert await subject.store.put("r/file", source)
        assert await subject.peek("r/file") == body
        assert source.read_bytes() == body

    async def test_put_replaces(self, subject: Subject) -> None:
        await subject.store.put("r/alias", b"one, longer")
        assert await subject.store.put("r/alias", b"two") is True
        assert await subject.store.get("r/alias", limit=100) == b"two"

    async def test_only_if_absent(self, subject: Subject, tmp_path: Path) -> None:
        assert await subject.store.put("r/once", b"first", only_if_absent=True) is True
        assert await subject.store.put("r/once", b"second", only_if_absent=True) is False
        source = tmp_path / "source"
        source.write_bytes(b"third")
        assert await subject.store.put("r/once", source, only_if_absent=True) is False
        assert await subject.peek("r/once") == b"first"

    async def test_one_winner_of_many(self, subject: Subject) -> None:
        """G13: of concurrent only-if-absent puts one wins, and its body is what is stored."""
        assert await subject.store.claims_are_atomic() is subject.atomic
        bodies = [b"body %d" % number for number in range(8)]
        answers = await asyncio.gather(
            *[subject.store.put("r/claim", body, only_if_absent=True) for body in bodies]
        )
        stored = await subject.peek("r/claim")
        if subject.atomic:
            assert answers.count(True) == 1
            assert stored == bodies[answers.index(True)]
        else:
            assert stored in bodies

    async def test_absent_is_not_found(self, subject: Subject) -> None:
        await subject.seed("r/there", b"x")
        for call in (
            subject.store.get("r/absent", limit=1),
            subject.store.stat("r/absent"),
            subject.reader.read("r/absent", 0, 1, priority=DEMAND),
            subject.store.get("r/there/below", limit=1),
            subject.store.get("r", limit=1),
        ):
            with pytest.raises(NotFound):
                await call

    async def test_stat(self, subject: Subject) -> None:
        await subject.seed("r/s", b"x" * 4321)
        stat = await subject.store.stat("r/s")
        assert (stat.key, stat.size) == ("r/s", 4321)
        assert stat.modified > 1_600_000_000

    async def test_delete(self, subject: Subject) -> None:
        await subject.seed("r/gone", b"x")
        await subject.store.delete("r/gone")
        await subject.store.delete("r/gone")
        assert await subject.peek("r/gone") is None
        with pytest.raises(NotFound):
            await subject.store.stat("r/gone")

    async def test_list(self, subject: Subject) -> None:
        sizes = {"r/a/1": 1, "r/a/2": 2, "r/a-b/3": 3, "r/a": 0, "s/a/1": 5, "r/b": 6}
        del sizes["r/a"]  # a key is never a directory of another
        for key, size in sizes.items():
            await subject.seed(key, b"x" * size)

        async def listed(prefix: str) -> dict[str, int]:
            found = [(stat.key, stat.size) async for stat in subject.store.list(prefix)]
            assert len(found) == len(dict(found))
            return dict(found)

        assert await listed("") == sizes
        assert await listed("r/a/") == {"r/a/1": 1, "r/a/2": 2}
        assert await listed("r/a") == {"r/a/1": 1, "r/a/2": 2, "r/a-b/3": 3}
        assert await listed("r/a/2") == {"r/a/2": 2}
        assert await listed("nothing/") == {}

    async def test_list_of_many(self, subject: Subject) -> None:
        """G7: more keys than a page holds, each once."""
        keys = {f"many/{number % 7}/{number:05}" for number in range(1203)}
        await asyncio.gather(*[subject.seed(key, b"") for key in keys])
        found = [stat.key async for stat in subject.store.list("many/")]
        assert sorted(found) == sorted(keys)

    async def test_ranges(self, subject: Subject) -> None:
        body = random.Random(2).randbytes(100_003)
        await subject.seed("r/pack", body)
        for offset, length in [(0, 1), (0, 100_003), (99_999, 4), (4096, 65536), (100_002, 1)]:
            got = await subject.reader.read("r/pack", offset, length, priority=DEMAND)
            assert type(got) is bytes
            assert got == body[offset : offset + length]

    async def test_many_ranges_at_once(self, subject: Subject) -> None:
        body = random.Random(3).randbytes(1 << 20)
        await subject.seed("r/pack", body)
        dice = random.Random(4)
        ranges = [(dice.randrange(1 << 19), 1 + dice.randrange(1 << 19)) for _ in range(100)]
        got = await asyncio.gather(
            *[
                subject.reader.read("r/pack", offset, length, priority=dice.choice(list(Priority)))
                for offset, length in ranges
            ]
        )
        assert got == [body[offset : offset + length] for offset, length in ranges]

    async def test_range_past_the_end(self, subject: Subject) -> None:
        """G3: what cannot be answered in full is an error, never short."""
        await subject.seed("r/pack", b"0123456789")
        for offset, length in [(0, 11), (9, 2), (10, 1), (500, 4)]:
            with pytest.raises(OriginProtocol):
                await subject.reader.read("r/pack", offset, length, priority=DEMAND)

    async def test_bad_ranges(self, subject: Subject) -> None:
        for offset, length in [(-1, 2), (0, 0), (0, -1), (0, 1 << 40)]:
            with pytest.raises(UsageError):
                await subject.reader.read("r/pack", offset, length, priority=DEMAND)

    @pytest.mark.parametrize("key", BAD_KEYS)
    async def test_bad_keys(self, subject: Subject, key: str) -> None:
        for call in (
            subject.store.get(key, limit=1),
            subject.store.put(key, b""),
            subject.store.stat(key),
            subject.store.delete(key),
            subject.reader.read(key, 0, 1, priority=DEMAND),
        ):
            with pytest.raises(UsageError):
                await call

    async def test_odd_keys_round_trip(self, subject: Subject) -> None:
        for key in ["a=b@c~d:e_f.g-h", "_/0", "x" * 200, "realm/a.b/c"]:
            await subject.store.put(key, key.encode())
            assert await subject.store.get(key, limit=900) == key.encode()
            assert await subject.reader.read(key, 0, len(key), priority=DEMAND) == key.encode()
            assert [stat.key async for stat in subject.store.list(key)] == [key]

    async def test_condemn_is_harmless(self, subject: Subject) -> None:
        await subject.seed("r/pack", b"body")
        subject.reader.condemn("r/pack")
        assert await subject.reader.read("r/pack", 1, 2, priority=DEMAND) == b"od"

    async def test_close_twice(self, subject: Subject) -> None:
        await subject.store.close()
        await subject.store.close()
        await subject.reader.close()
        await subject.reader.close()
