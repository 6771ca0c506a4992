"""Blob downloads from a hostile origin: resumed, bounded, verified, or refused."""

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import replace

import pytest
from kits.registry_server import Reply, ranged

from imagecache.errors import Busy, Denied, LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.digest import Digest
from imagecache.oci.pacing import Patience, ThroughputFloor
from imagecache.oci.partial import PartialBlob
from imagecache.oci.transport import OriginProtocol

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def blob(size, seed=1):
    return random.Random(seed).randbytes(size)


def described(body, algorithm="sha256", **more):
    return Descriptor(LAYER, Digest.of(body, algorithm), len(body), **more)


@pytest.fixture
def fetch(server, source, tmp_path):
    """Serve one blob by `handler`, fetch it, return (target's bytes, progress counts)."""

    async def run(body, handler, *, descriptor=None, partial=None, **changes):
        descriptor = descriptor or described(body)
        server.routes[f"/v2/app/blobs/{descriptor.digest}"] = handler
        target = tmp_path / "blob"
        if partial is not None:
            (tmp_path / "blob.partial").write_bytes(partial)
        counts = []
        async with source(**changes) as s:
            await s.fetch_blob(descriptor, target, counts.append)
        assert not (tmp_path / "blob.partial").exists()
        return target.read_bytes(), counts

    return run


@pytest.fixture
def nothing_left(tmp_path):
    def check():
        assert not (tmp_path / "blob").exists()
        assert not (tmp_path / "blob.partial").exists()

    return check


async def test_whole_blob_and_progress(fetch):
    """A blob of many batches; the counts rise to its size."""
    body = blob(5_000_000)
    got, counts = await fetch(body, lambda r: ranged(body, r.start_of_range()))
    assert got == body
    assert counts == sorted(set(counts)) and counts[-1] == len(body) and len(counts) > 3


async def test_tail_sees_what_progress_says(server, source, tmp_path):
    """While a blob downloads, the first n bytes of the partial file are there and right."""
    body = blob(4_000_000)
    server.routes[f"/v2/app/blobs/{described(body).digest}"] = lambda r: ranged(body, None)
    target = tmp_path / "blob"

    def tail(count):
        path = target if target.exists() else tmp_path / "blob.partial"
        assert path.read_bytes()[:count] == body[:count]

    async with source() as s:
        await s.fetch_blob(described(body), target, tail)


async def test_sha512_and_empty_blobs(fetch):
    """B5: sha512 digests are verified; a blob of no bytes is a blob."""
    body = blob(1000)
    got, _ = await fetch(body, lambda r: ranged(body, None), descriptor=described(body, "sha512"))
    assert got == body
    got, _ = await fetch(b"", lambda r: Reply(200, b""))
    assert got == b""


async def test_a12_short_blob(server, fetch, nothing_left):
    """A12: a blob that ends early, with a correct Content-Length of the short one."""
    body = blob(10_000)
    with pytest.raises(Rejected, match=r"ends after 9000 of 10000|no byte"):
        await fetch(body, lambda r: Reply(200, body[:9000]))
    assert len(server.seen) <= 7
    nothing_left()


async def test_a12_short_once(fetch):
    """A12: short the first time, right when resumed."""
    body = blob(10_000)

    def handler(request):
        start = request.start_of_range()
        return Reply(200, body[:9000]) if start is None else ranged(body, start)

    assert (await fetch(body, handler))[0] == body


@pytest.mark.parametrize("chunked", [False, True])
async def test_a13_long_blob(server, fetch, nothing_left, chunked):
    """A13: a blob that goes on after its size is refused, without reading it all."""
    body = blob(10_000)
    with pytest.raises(Rejected, match="longer"):
        await fetch(body, lambda r: Reply(200, body + b"x" * 10_000_000, chunked=chunked))
    assert len(server.seen) == 1
    nothing_left()


def resetting(body, cuts):
    """A handler that resets the connection at each absolute offset in `cuts`, once."""
    left = sorted(cuts)

    async def handler(request):
        start = request.start_of_range() or 0
        reply = ranged(body, request.start_of_range())
        if not left:
            return reply
        cut = left.pop(0)
        lines = "".join(f"{k}: {v}\r\n" for k, v in reply.headers.items())
        head = f"HTTP/1.1 {reply.status} X\r\n{lines}Content-Length: {len(reply.body)}\r\n\r\n"
        await request.raw(head.encode() + body[start : max(cut, start)])
        await asyncio.sleep(0.005)  # let the bytes go before the RST throws them away
        request.reset()
        return None

    return handler


async def test_a14_resets(server, fetch):
    """A14: the connection is reset at each of ten offsets; the blob is right all the same."""
    await reset_at(fetch, server, 10)


@pytest.mark.soak
async def test_a14_a_thousand_resets(server, fetch):
    """A14: the same at each of 1,000 offsets."""
    await reset_at(fetch, server, 1000)


async def reset_at(fetch, server, count):
    body = blob(count * 997)
    cuts = [997 * n + n % 13 + 1 for n in range(count)]
    got, counts = await fetch(body, resetting(body, cuts))
    assert got == body
    ranges = [r.headers for r in server.seen if "range" in r.headers]
    assert len(ranges) > count // 2
    assert all(headers.get("if-range") == '"e"' for headers in ranges)
    assert counts[-1] == len(body) and counts == sorted(counts)


async def test_a14_resume_of_an_earlier_run(server, fetch):
    """A14: what an earlier run left is hashed, not fetched again."""
    body = blob(100_000)
    got, counts = await fetch(
        body, lambda r: ranged(body, r.start_of_range()), partial=body[:60_000]
    )
    assert got == body and counts[0] == 60_000
    assert [r.start_of_range() for r in server.seen] == [60_000]


async def test_a14_complete_partial_needs_no_request(server, fetch):
    """A14: a partial file that is whole is verified and taken."""
    body = blob(100_000)
    assert (await fetch(body, lambda r: Reply(500), partial=body))[0] == body
    assert not server.seen


@pytest.mark.parametrize("rotten", [b"x" * 500, b"x" * 1000, b"x" * 2000])
async def test_a14_rotten_partial(fetch, rotten):
    """A14: a partial file of other bytes costs one more download, never a wrong blob."""
    body = blob(1000)
    assert (await fetch(body, lambda r: ranged(body, r.start_of_range()), partial=rotten))[
        0
    ] == body


async def test_a15_range_ignored(fetch):
    """A15: a 200 to a range request starts from 0, and is never appended."""
    body = blob(50_000)
    got, counts = await fetch(body, lambda r: ranged(body, None), partial=body[:20_000])
    assert got == body and 0 in counts


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 10000-49999/50000",
        "bytes 20001-49999/50000",
        "bytes 20000-49999/60000",
        "bytes 20000-60000/*",
        "bytes */50000",
        "items 20000-49999/50000",
        "",
    ],
)
async def test_a16_wrong_content_range(server, fetch, content_range):
    """A16: a 206 of another range is discarded; the blob comes whole instead."""
    body = blob(50_000)

    def handler(request):
        if request.start_of_range() is None:
            return Reply(200, body)
        return Reply(206, body[20_000:], {"Content-Range": content_range})

    assert (await fetch(body, handler, partial=body[:20_000]))[0] == body
    assert len(server.seen) == 2


async def test_a16_206_without_a_question(fetch, server):
    """A16: an origin that answers ranges nobody asked for is an origin protocol error."""
    body = blob(5_000)
    with pytest.raises(OriginProtocol):
        await fetch(body, lambda r: Reply(206, body, {"Content-Range": "bytes 0-4999/5000"}))


async def test_a16_range_of_right_place_and_wrong_bytes(fetch):
    """A16: right headers over wrong bytes: found by the digest, and fetched whole."""
    body = blob(50_000)

    def handler(request):
        start = request.start_of_range()
        return ranged(body if start is None else bytes(50_000), start)

    assert (await fetch(body, handler, partial=body[:20_000]))[0] == body


async def test_a17_chunked(fetch):
    """A17: no Content-Length."""
    body = blob(3_000_000)
    assert (await fetch(body, lambda r: Reply(200, body, chunked=True)))[0] == body


async def test_a18_content_encoding_is_not_decoded(fetch, nothing_left):
    """A18: Content-Encoding on a blob: the bytes as served are what is verified and kept."""
    import gzip

    plain = b"hello " * 1000
    packed = gzip.compress(plain, mtime=0)
    got, _ = await fetch(packed, lambda r: Reply(200, packed, {"Content-Encoding": "gzip"}))
    assert got == packed


async def test_a18_encoded_other_blob(fetch, nothing_left):
    """A18: an origin that compresses a blob on the way serves another blob."""
    import gzip

    plain = random.Random(1).randbytes(200) * 2
    packed = gzip.compress(plain, mtime=0)
    with pytest.raises(Rejected):
        await fetch(plain, lambda r: Reply(200, packed, {"Content-Encoding": "gzip"}))
    nothing_left()


async def test_a20_wrong_body(server, fetch, nothing_left):
    """A20: the right headers over another body of the right size: rejected after one more try."""
    body = blob(5_000)
    headers = {"Docker-Content-Digest": str(described(body).digest)}
    with pytest.raises(Rejected, match="does not match its digest"):
        await fetch(body, lambda r: Reply(200, blob(5_000, seed=2), headers))
    assert len(server.seen) == 2
    nothing_left()


async def test_a21_one_byte_at_a_time(server, fetch, limits, tmp_path):
    """A21: under the throughput floor for a window: dropped, tried again, then an error."""
    body = blob(5_000)

    async def drip(request):
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        for n in range(5_000):
            await request.raw(body[n : n + 1])
            await asyncio.sleep(0.02)

    slow = replace(limits, stall_window_seconds=0.3, stall_bytes_per_second=1024)
    with pytest.raises(Unavailable, match="bytes/s"):
        await fetch(body, drip, limits=slow)
    assert len(server.seen) == 3
    assert (tmp_path / "blob.partial").exists()


async def test_a21_silence(server, fetch, limits):
    """A21: an origin that says nothing more, in the middle and before the headers."""
    body = blob(5_000)

    async def mute(request):
        if request.start_of_range() is None:
            await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + body[:100])
        await asyncio.sleep(60)

    slow = replace(limits, stall_window_seconds=0.2, head_seconds=0.2)
    with pytest.raises(Unavailable):
        await fetch(body, mute, limits=slow)


async def test_a21_total_deadline(fetch, limits, tmp_path):
    """A21: a blob has a deadline as a whole; what came stays for the next call."""
    body = blob(5_000)

    async def mute(request):
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + body[:100])
        await asyncio.sleep(60)

    with pytest.raises(Unavailable, match="not complete"):
        await fetch(body, mute, limits=replace(limits, blob_base_seconds=0.5))
    assert (tmp_path / "blob.partial").read_bytes() == body[:100]


@pytest.mark.quick
def test_a21_floor():
    """A21: the window slides, and counts across connections."""
    floor = ThroughputFloor(window_seconds=60, bytes_per_second=1000, now=0)
    assert not floor.too_slow(59)
    assert floor.too_slow(60)
    floor.note(60_000, 30)
    assert not floor.too_slow(60) and not floor.too_slow(85)
    assert floor.too_slow(91)
    floor.restart(100)
    assert not floor.too_slow(159) and floor.too_slow(160)


@pytest.mark.quick
def test_patience_wants_new_ground():
    """Progress over the best so far buys new attempts, going over old ground does not."""
    patience = Patience(3)
    assert not patience.failed(10) and not patience.failed(10) and not patience.failed(5)
    assert patience.failed(10)
    patience = Patience(3)
    assert not any(patience.failed(n) for n in range(1, 1000))


async def flood_one_line(request):
    await request.raw(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(1600):
        await request.raw(b"x" * 65536)


async def flood_many_lines(request):
    await request.raw(b"HTTP/1.1 200 OK\r\n")
    for n in range(10_000):
        await request.raw(b"X-%d: y\r\n" % n)
    await request.raw(b"\r\n")


@pytest.mark.parametrize("flood", [flood_one_line, flood_many_lines])
async def test_a22_header_floods(server, fetch, flood):
    """A22: 100 MB of headers, and 10,000 header lines, end at the client's caps."""
    with pytest.raises(LimitExceeded, match="headers"):
        await fetch(blob(10), flood)
    assert len(server.seen) == 1


async def test_a22_not_http(fetch):
    """A22: an origin that does not speak HTTP at all."""

    async def noise(request):
        await request.raw(b"\x00\x01SSH-2.0-noise\r\n\r\n")

    with pytest.raises(Unavailable):
        await fetch(blob(10), noise)


@pytest.mark.parametrize("status", [404, 410, 416, 400, 418])
async def test_a24_gone(fetch, nothing_left, status):
    """A24: blob 404, 416 and other refusals are clear errors, and leave nothing."""
    kind = {404: NotFound, 416: Unavailable}.get(status, Rejected)
    with pytest.raises(kind):
        await fetch(blob(10), lambda r: Reply(status))


async def test_a24_416_on_resume(fetch):
    """A24: a 416 to a resume starts over."""
    body = blob(1000)

    def handler(request):
        return Reply(416) if request.start_of_range() is not None else Reply(200, body)

    assert (await fetch(body, handler, partial=body[:500]))[0] == body


async def test_server_errors_are_retried(fetch):
    """5xx and lost connections are tried again, without end they are Unavailable."""
    body = blob(1000)
    replies = [Reply(500), Reply(503, b"", {"Retry-After": "0"}), Reply(502)]
    got, _ = await fetch(body, lambda r: replies.pop() if replies else ranged(body, None))
    assert got == body
    with pytest.raises(Unavailable):
        await fetch(blob(9), lambda r: Reply(500))


async def test_nobody_listens(source, server, tmp_path):
    """A registry that is not there is Unavailable, not NotFound."""
    async with source(host="127.0.0.1:1") as s:
        with pytest.raises(Unavailable, match="connect"):
            await s.fetch_blob(described(b"x"), tmp_path / "blob", lambda n: None)


async def test_cancelled_download_resumes(server, source, tmp_path):
    """A cancelled download gives its lock back, keeps its bytes, and the next call goes on."""
    body = blob(3_000_000)
    arrived = asyncio.Event()

    async def stuck(request):
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + body[:2_500_000])
        await asyncio.sleep(60)

    path = f"/v2/app/blobs/{described(body).digest}"
    server.routes[path] = stuck
    target = tmp_path / "blob"
    async with source() as s:
        task = asyncio.create_task(s.fetch_blob(described(body), target, lambda n: arrived.set()))
        await arrived.wait()
        with pytest.raises(Busy):
            await s.fetch_blob(described(body), target, lambda n: None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (tmp_path / "blob.partial").stat().st_size >= 1_000_000
        server.routes[path] = lambda r: ranged(body, r.start_of_range())
        await s.fetch_blob(described(body), target, lambda n: None)
    assert target.read_bytes() == body


async def test_existing_target(server, fetch, tmp_path):
    """A right target costs no request; a wrong one is replaced."""
    body = blob(1000)
    (tmp_path / "blob").write_bytes(body)
    assert (await fetch(body, lambda r: ranged(body, None)))[0] == body
    assert not server.seen
    (tmp_path / "blob").write_bytes(bytes(1000))
    assert (await fetch(body, lambda r: ranged(body, None)))[0] == body


async def test_target_is_a_trap(fetch, tmp_path):
    """A link, a pipe or a directory in place of the partial file is refused, not followed."""
    import os

    body = blob(1000)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "blob.partial").symlink_to(outside)
    with pytest.raises(Rejected):
        await fetch(body, lambda r: ranged(body, None))
    assert outside.read_bytes() == b"precious"
    (tmp_path / "blob.partial").unlink()
    os.mkfifo(tmp_path / "blob.partial")
    with pytest.raises(Denied):
        await fetch(body, lambda r: ranged(body, None))


@pytest.mark.quick
def test_partial_file_states(tmp_path):
    """Locked while open, hashed from what is there, cut when longer than the blob can be."""
    body = blob(1000)
    first = PartialBlob(tmp_path / "b", Digest.of(body), 1000)
    first.open()
    first.append([body[:400]])
    second = PartialBlob(tmp_path / "b", Digest.of(body), 1000)
    with pytest.raises(Busy):
        second.open()
    assert not first.commit()
    first.close()
    second.open()
    assert second.length == 400
    assert second.append([body[400:]]) == 1000
    with pytest.raises(LimitExceeded):
        second.append([b"x"])
    assert second.commit()
    assert (tmp_path / "b").read_bytes() == body


async def test_b10_foreign_layer(server, other_server, source, tmp_path):
    """B10: the registry first; URLs only where enabled, by https, public, without credentials."""
    body = blob(1000)
    urls = (f"http://{other_server.host}/l", f"https://{other_server.host}/l", "file:///etc/passwd")
    descriptor = described(body, urls=urls)
    async with source() as s:
        with pytest.raises(NotFound, match="foreign"):
            await s.fetch_blob(descriptor, tmp_path / "b", lambda n: None)
    async with source(foreign_urls=True) as s:
        with pytest.raises(Denied):
            await s.fetch_blob(descriptor, tmp_path / "b", lambda n: None)
    assert other_server.connections == 0
    server.routes[f"/v2/app/blobs/{descriptor.digest}"] = lambda r: ranged(body, None)
    async with source() as s:
        await s.fetch_blob(descriptor, tmp_path / "b", lambda n: None)
    assert hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest() == descriptor.digest.hex


async def test_b13_inline_content(source, tmp_path, server):
    """B13: content that its descriptor carries needs no request."""
    body = b"inline"
    async with source() as s:
        await s.fetch_blob(described(body, inline=body), tmp_path / "b", lambda n: None)
    assert (tmp_path / "b").read_bytes() == body and not server.seen
