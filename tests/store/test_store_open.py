"""URLs and the whole tower: tier, faults, deadlines."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kits.s3_servers import BUCKET, S3Server, free_port, running
from kits.store_scripted import FAULTS, QUICK, FaultyOrigin, FixedUrls, scripted

import imagecache.store
from imagecache.errors import CubecacheError, NotFound, Unavailable, UsageError
from imagecache.store.base import Priority
from imagecache.store.counters import ReadCounters
from imagecache.store.hedge import HedgedReader
from imagecache.store.open import open_store
from imagecache.store.open_s3 import parse_s3
from imagecache.store.policy import RetryPolicy
from imagecache.store.rangeclient import HttpRangeReader
from imagecache.store.retry import RetryReader
from imagecache.store.settings import StoreSettings
from imagecache.store.tier import TieredReader
from imagecache.store.wrappers import LimitedReader, MeteredReader

DEMAND = Priority.DEMAND


@pytest.mark.quick
@pytest.mark.parametrize(
    "url",
    [
        "", "/path", "file:", "file://", "file:///", "file://host/path", "file:relative", "ftp://x/",
        "s3:", "s3:///prefix", "s3://b:80/", "s3://b?endpoint=ftp://x", "s3://b?endpoint=x",
        "s3://b?endpint=http://x", "s3://b?nonsense", "s3://b/a b", "s3://b/../x", "s3://b?style=odd",
        "s3://b#fragment", "s3://b?tier=nonsense", "s3://b?endpoint=http://u:p@h/", "memory:x",
        "file:///x?y=z", "s3://[", "file:///a%00b",
    ],
)  # fmt: skip
def test_malformed_urls(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        open_store(url)
    assert raised.value.remedy or "malformed" in str(raised.value) or "style" in str(raised.value)


@pytest.mark.quick
def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as raised:
        open_store("s3://AKIAKEY:topsecret@bucket/prefix")
    assert "topsecret" not in str(raised.value)


@pytest.mark.quick
def test_s3_urls() -> None:
    location, tier = parse_s3(
        "s3://b/p/q/?endpoint=http%3A//h:9000/&region=r&profile=me&style=virtual&tier=http://t:80"
    )
    assert (location.bucket, location.prefix, location.endpoint) == ("b", "p/q", "http://h:9000")
    assert (location.region, location.profile, location.path_style) == ("r", "me", False)
    assert tier == "http://t:80"
    assert parse_s3("s3://b")[0].full_key("k") == "k"
    assert location.full_key("k") == "p/q/k"


async def test_a_directory_by_url(tmp_path: Path) -> None:
    opened = open_store(f"file://{tmp_path}/a%20b")
    assert await opened.store.put("r/x", b"0123")
    assert (tmp_path / "a b" / "r" / "x").read_bytes() == b"0123"
    assert await opened.reader.read("r/x", 1, 2, priority=DEMAND) == b"12"
    assert opened.counters.origin[DEMAND].bytes == 2
    await opened.close()


async def test_memory_by_url() -> None:
    opened = open_store("memory:")
    assert await opened.store.put("r/x", b"0123")
    assert await opened.reader.read("r/x", 1, 2, priority=DEMAND) == b"12"
    await opened.close()


BODY = random.Random(11).randbytes(1 << 20)


def tower(base: str, tier: str | None, counters: ReadCounters, seed: int) -> TieredReader:
    """The composition of `open_store`, on servers without signatures and with short deadlines."""
    policy = RetryPolicy(attempts=8, base_s=0.002, cap_s=0.05, not_found_attempts=6)
    places = dict.fromkeys(Priority, 32)
    metered = MeteredReader(HttpRangeReader(FixedUrls(base), QUICK, name="origin"), counters.origin)
    hedged = HedgedReader(metered, counters.origin)
    limited = LimitedReader(hedged, places, counters.origin)
    origin = RetryReader(
        limited, policy, dict.fromkeys(Priority, 10.0), counters.origin, dice=random.Random(seed)
    )
    http = HttpRangeReader(FixedUrls(tier or base), QUICK, name="tier")
    return TieredReader(MeteredReader(http, counters.tier), origin, counters, patience_s=0.4)


async def random_reads(count: int, share: float, seed: int) -> Counter[str]:
    """Reads as the fetcher does: wrong bytes are condemned and read again."""
    origin_faults = FaultyOrigin(BODY, share, seed)
    tier_faults = FaultyOrigin(BODY, share, seed + 1)
    counters = ReadCounters()
    dice = random.Random(seed + 2)
    ends: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    slowest = 0.0

    async def worker(reader: TieredReader, reads: int) -> None:
        nonlocal slowest
        for _ in range(reads):
            length = 1 + dice.randrange(8192)
            offset = dice.randrange(len(BODY) - length)
            key = f"r/pack{dice.randrange(50)}"
            started = loop.time()
            for _ in range(4):
                try:
                    got = await reader.read(
                        key, offset, length, priority=dice.choice(list(Priority))
                    )
                except CubecacheError as error:
                    ends[type(error).__name__] += 1
                    break
                assert len(got) == length
                if got == BODY[offset : offset + length]:
                    ends["right"] += 1
                    break
                ends["condemned"] += 1
                reader.condemn(key)
            else:
                ends["gave up"] += 1
            slowest = max(slowest, loop.time() - started)

    async with scripted(origin_faults) as origin, scripted(tier_faults) as tier:
        reader = tower(origin.base, tier.base, counters, seed)
        await asyncio.gather(*[worker(reader, count // 16) for _ in range(16)])
        await reader.close()
    print(f"seed {seed}: {dict(ends)}, slowest {slowest:.2f} s, drawn {origin_faults.drawn}")
    print(counters.snapshot())
    assert slowest < 4 * 11.0
    assert set(origin_faults.drawn) <= set(FAULTS)
    return ends


async def test_random_reads_through_random_faults() -> None:
    """G1-G4, G6, L1: 20 % faults of all kinds at origin and tier: no wrong byte, no hang."""
    seed = int(os.environ.get("STORE_SEED", random.randrange(1 << 30)))
    ends = await random_reads(1600, 0.2, seed)
    assert ends["right"] >= 1600 * 0.97


@pytest.mark.soak
async def test_100_000_random_reads_through_random_faults() -> None:
    """G1-G4, G6, L1: the issue's count."""
    seed = int(os.environ.get("STORE_SEED", random.randrange(1 << 30)))
    ends = await random_reads(100_000, 0.2, seed)
    assert ends["right"] >= 100_000 * 0.97


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """The shipped configuration with everything but the origin filled in; start it by `tier_of`."""
    shipped = Path(imagecache.store.__file__).with_name("tier-nginx.conf").read_text()
    port = free_port()
    text = shipped.replace("@LISTEN@", f"127.0.0.1:{port}").replace("@CACHE@", str(tmp_path / "c"))
    config = tmp_path / "nginx.conf"
    temps = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # or its worker could not enter tmp_path
    config.write_text(
        f"{user} pid {tmp_path}/pid; error_log {tmp_path}/log; daemon off; worker_processes 1;"
        f"events {{}} http {{ {temps} {text} }}"
    )
    yield f"http://127.0.0.1:{port}", config


@pytest.mark.usefixtures("aws_keys")
async def test_nginx_as_the_shared_tier(moto: S3Server, nginx: tuple[str, Path]) -> None:
    """L1: the shipped nginx configuration serves ranges, caches them, and its death is no error."""
    base, config = nginx
    origin = moto.endpoint.removeprefix("http://")
    config.write_text(config.read_text().replace("@ORIGIN@", origin).replace("@SCHEME@", "http"))
    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert binary is not None, "nginx is installed by tools/setup"
    body = random.Random(12).randbytes(3_500_000)
    opened = open_store(moto.url("tiered") + f"&tier={base}", StoreSettings(tier_patience_s=10.0))
    await opened.store.put("r/pack", body)
    await opened.store.put("r/other", body)
    ranges = [(0, 1), (1_048_000, 2000), (5, 3_000_000), (3_499_999, 1)]
    command = [binary, "-c", str(config), "-p", str(config.parent)]
    with running(command, int(base.rpartition(":")[2]), config.with_name("out")):
        for offset, length in ranges:
            got = await opened.reader.read("r/pack", offset, length, priority=DEMAND)
            assert got == body[offset : offset + length]
        assert opened.counters.tier_fallbacks == 0
        assert opened.counters.origin[DEMAND].requests == 0
        await opened.store.delete("r/pack")
        got = await opened.reader.read("r/pack", 100, 1_000_000, priority=DEMAND)
        assert got == body[100:1_000_100], "the slices are kept"
        with pytest.raises(NotFound):
            await opened.reader.read("r/absent", 0, 1, priority=DEMAND)
    assert await opened.reader.read("r/other", 7, 70, priority=DEMAND) == body[7:77]
    assert opened.counters.origin[DEMAND].requests > 0
    await opened.close()


@pytest.mark.usefixtures("aws_keys")
async def test_an_unreachable_endpoint_ends_in_time() -> None:
    """G16: nobody listens: both planes end with Unavailable, within the deadlines."""
    settings = StoreSettings(
        retry=RetryPolicy(attempts=3, base_s=0.001), deadlines_s=dict.fromkeys(Priority, 2.0)
    )
    opened = open_store(f"s3://{BUCKET}?endpoint=http://127.0.0.1:1", settings)
    with pytest.raises(Unavailable):
        await opened.store.stat("r/x")
    with pytest.raises(Unavailable):
        await opened.reader.read("r/x", 0, 1, priority=DEMAND)
    assert opened.counters.origin[DEMAND].retries == 2
    await opened.close()


@pytest.mark.usefixtures("aws_keys")
async def test_presigned_urls_are_made_once_and_renewed(moto: S3Server) -> None:
    """A7: one signature per object, however many reads; a new one before the old one ends."""
    from imagecache.store.s3_client import BucketClient
    from imagecache.store.s3_urls import PresignedUrls
    from imagecache.store.settings import S3Limits

    client = BucketClient(parse_s3(moto.url("urls"))[0], S3Limits())
    now = 0.0
    urls = PresignedUrls(client, clock=lambda: now)
    signed = 0
    plain = client.presign

    async def counting(key: str) -> str:
        nonlocal signed
        signed += 1
        return await plain(key)

    client.presign = counting  # type: ignore[method-assign]
    found = await asyncio.gather(*[urls.find("r/pack") for _ in range(50)])
    assert signed == 1 and len(set(found)) == 1
    assert urls.known("r/pack") == found[0]
    now = 3299.0
    assert urls.known("r/pack") == found[0]
    now = 3301.0
    assert urls.known("r/pack") is None
    await urls.find("r/pack")
    assert signed == 2
    await client.close()
