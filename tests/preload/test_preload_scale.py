"""Jobs of a real daemon: killed again and again, asked for by a thousand, on several hosts."""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from imagemaker.entries import EPOCH, Entry, write_tar
from imagemaker.layout import LayerSource, write_layout
from imagemaker.layout import Settings as ImageSettings
from kits.counting_registry import CountingRegistry, SilentRegistry
from kits.image import write_image
from kits.upgrading import SECONDS, ServedHost

from imagecache.composition import ImageRequest
from imagecache.errors import Busy, Unavailable
from imagecache.settings import Settings
from preload.blocking import connect_blocking, connect_url_blocking
from preload.client import connect
from preload.fanout import MergedProgress, Order, preload_on

SMALL = 24 << 20
LARGE = int(os.environ.get("CUBECACHE_TEST_LARGE_BYTES", 5 << 30))


def ended(host: ServedHost, identity: str) -> dict[str, Any]:
    """A job, once it has ended."""
    deadline, seen = time.monotonic() + 2 * SECONDS, -1
    while True:
        job: dict[str, Any] = host.call("GET", f"/v1/preloads/{identity}?wait=5&since={seen}")
        seen = job["version"]
        if job["state"] not in ("queued", "running"):
            return job
        assert time.monotonic() < deadline, job


def large_image(directory: Path, rng: random.Random, size: int) -> Path:
    """An image of incompressible layers, one at a time in memory."""
    sources = []
    count = max(8, size // (256 << 20))
    for number in range(count):
        part = size // count // 4
        entries = [Entry(f"f{number}-{n}", content=rng.randbytes(part)) for n in range(4)]
        path = directory / f"layer-{number}.tar"
        path.write_bytes(write_tar(entries, ordered=True))
        sources.append(LayerSource(path, "none", "test"))
    folder = directory / "image"
    write_layout(folder, "latest", sources, ImageSettings(), epoch=EPOCH)
    for source in sources:
        source.tar.unlink()
    return folder


@pytest.mark.parametrize(
    # `lost`: what a killed process had received, but not written: most of it the kernel's buffers.
    ("size", "kills", "rate", "pause", "lost"),
    [
        (SMALL, 3, 8 << 20, 0.5, 4 << 20),
        pytest.param(LARGE, 10, LARGE // 50, 8, 32 << 20, marks=pytest.mark.soak),
    ],
)
def test_killed_at_random_moments_it_fetches_nothing_twice(
    tmp_path: Path, *, size: int, kills: int, rate: int, pause: float, lost: int
) -> None:
    """I9: the same digest as undisturbed, and what was stored is not fetched again."""
    seed = int(os.environ.get("CUBECACHE_TEST_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder = large_image(tmp_path, rng, size)
    with CountingRegistry(folder) as registry, ServedHost(tmp_path / "state") as host:
        with ServedHost(tmp_path / "alone") as alone:
            (line,) = alone.cubecache("preload", f"oci:{folder}:latest", "--json").splitlines()
            wanted = json.loads(line)
        image = f"{registry.host}/large:v1"
        host.serve()
        body = {"images": [image], "limit_bytes_per_second": rate}
        (job,) = host.call("POST", "/v1/preloads", body)["preloads"]
        for _ in range(kills):
            # At any moment after something more was fetched; or of the conversion that follows.
            before, began = registry.layer_bytes, time.monotonic()
            while registry.layer_bytes < before + (2 << 20) and time.monotonic() < began + 5:
                time.sleep(0.01)
            time.sleep(rng.random() * pause)
            host.kill()
            host.serve()
        job = ended(host, job["id"])
        assert job["state"] == "done", job
        assert job["result"]["block_image"] == wanted["block_image"]
        print(f"{registry.bytes} bytes of layers, {registry.layer_bytes} fetched, {kills} kills")
        assert registry.layer_bytes <= registry.bytes + kills * lost
        host.stop()


async def test_a_thousand_preloads_are_one_job_and_a_hundred_images_queue(tmp_path: Path) -> None:
    """I7: at the API of a real daemon; within the limits they queue, beyond them it is 429."""
    config = tmp_path / "config.toml"
    config.write_text("[preload]\nconcurrency = 3\nqueued_per_owner = 100\n")
    config.chmod(0o600)
    with SilentRegistry() as registry, ServedHost(tmp_path / "state") as host:
        host.environment["CUBECACHE_CONFIG"] = str(config)
        await asyncio.to_thread(host.serve)
        async with connect(Settings(host.state, "file:///unused"), start=False) as client:
            one = ImageRequest.parse(f"{registry.host}/app:v1", None, "erofs")
            found = await asyncio.gather(*(client.submit([one]) for _ in range(1000)))
            assert len({jobs[0]["id"] for jobs in found}) == 1
            assert len(await client.jobs()) == 1
            others = [
                ImageRequest.parse(f"{registry.host}/app:v{n}", None, "erofs")
                for n in range(2, 101)
            ]
            await asyncio.gather(*(client.submit(others[at : at + 33]) for at in (0, 33, 66)))
            with pytest.raises(Busy):
                await client.submit(
                    [ImageRequest.parse(f"{registry.host}/one:more", None, "erofs")]
                )
            states = [job["state"] for job in await client.jobs()]
            assert len(states) == 100
            assert (states.count("running"), states.count("queued")) == (3, 97)
            ids = [job["id"] for job in await client.jobs()]
            for identity in ids[50:]:
                await client.cancel(identity)
            for identity in ids[:50]:
                await client.cancel(identity)
            assert {job["state"] for job in await client.jobs()} == {"cancelled"}
        await asyncio.to_thread(host.stop)


async def test_several_hosts_each_do_their_own_and_one_may_fail(tmp_path: Path) -> None:
    """Fan-out over TCP with tokens: results side by side, a dead host and a wrong token told."""
    image = write_image(tmp_path / "image", [[Entry("f", content=os.urandom(1 << 20))]])
    with ServedHost(tmp_path / "a") as first, ServedHost(tmp_path / "b") as second:
        hosts = (first, second)
        told = json.loads(first.cubecache("token", "fleet", "--role", "preload", "--json"))
        urls = []
        with SilentRegistry() as closed:
            urls.append(f"http://{closed.host}")  # a port that nobody listens on, afterwards
        for number, host in enumerate(hosts):
            with SilentRegistry() as free:
                place = free.host
            (tmp_path / f"tokens-{number}").write_text(told["toml"])
            config = tmp_path / f"config-{number}.toml"
            config.write_text(
                f'[api]\ntcp = "{place}"\ntokens = "{tmp_path}/tokens-{number}"\n'
                "private_images = true\n"
            )
            for path in (config, tmp_path / f"tokens-{number}"):
                path.chmod(0o600)
            host.environment["CUBECACHE_CONFIG"] = str(config)
            await asyncio.to_thread(host.serve)
            urls.append(f"http://{place}")
        seen: list[tuple[int, int]] = []

        def note(progress: MergedProgress) -> None:
            seen.append((progress.ended, progress.jobs))

        order = Order([ImageRequest.parse(image, None, "erofs")], warm="whole")
        outcomes = await preload_on(urls, order, token=told["token"], on_progress=note)
        assert [outcome.host for outcome in outcomes] == urls
        assert isinstance(outcomes[0].error, Unavailable)
        results = [outcome.result for outcome in outcomes[1:]]
        assert results[0] is not None and results[1] is not None
        assert results[0]["block_image"] == results[1]["block_image"]
        assert seen[-1] == (3, 3)
        # The same by the command: what was done is printed, what failed is its exit status.
        arguments = [part for url in urls for part in ("--on", url)]
        first.environment["CUBECACHE_TOKEN"] = told["token"]
        outcome = await asyncio.to_thread(first.outcome, "preload", image, "--json", *arguments)
        lines = [json.loads(line) for line in outcome.stdout.splitlines()]
        assert outcome.returncode == 69
        assert [line["error"] is None for line in lines[:3]] == [False, True, True]
        # Warm: all of it is in the cache already.
        for host in hosts:
            host.export(image)
            (export,) = host.call("GET", "/v1/exports")["exports"]
            assert export["fill"]["mode"] == "whole"
        with pytest.raises(Exception, match="token"):
            await asyncio.to_thread(_listed, urls[1], "wrong")
        assert len(await asyncio.to_thread(_listed, urls[1], told["token"])) == 2
        for host in hosts:
            await asyncio.to_thread(host.stop)


def _listed(url: str, token: str) -> list[dict[str, Any]]:
    with connect_url_blocking(url, token=token) as client:
        return client.jobs()


def test_the_blocking_client_says_the_same(tmp_path: Path) -> None:
    """Submit, wait, export and end, without an event loop; across an upgrade."""
    image = write_image(tmp_path / "image", [[Entry("f", content=os.urandom(1 << 20))]])
    with ServedHost(tmp_path / "state") as host:
        host.serve()
        with connect_blocking(Settings(host.state, "file:///unused"), start=False) as client:
            request = ImageRequest.parse(image, None, "erofs")
            assert not client.plan([request])[0]["present"]
            (job,) = client.submit([request], limit_bytes_per_second=1 << 20)
            states: list[str] = []
            result = client.wait(job, lambda job: states.append(job["state"]))
            assert result["name"] == image
            handle = client.export(image, writable=True)
            host.upgrade()
            assert [export["name"] for export in client.exports()] == [handle.name]
            assert [job["state"] for job in client.jobs()] == ["done"]
            client.unexport(handle.name)
            assert client.exports() == []
        assert not (host.state / "overlays" / handle.name).exists()
        host.stop()
