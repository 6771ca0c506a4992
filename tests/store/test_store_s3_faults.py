"""The S3 control plane against answers that servers should not give, and odd set-ups."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest
from aiohttp import web
from kits.s3_servers import BUCKET, S3Server, plain_client
from kits.store_scripted import Scripted, part, s3_error, scripted
from multidict import MultiMapping

from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable
from imagecache.store.base import OriginProtocol, Priority, Throttled
from imagecache.store.open import OpenedStore, open_store
from imagecache.store.policy import RetryPolicy
from imagecache.store.probe import probe
from imagecache.store.s3 import S3Store
from imagecache.store.s3_client import BucketClient, parse_date_shift
from imagecache.store.settings import S3Limits, StoreSettings

pytestmark = pytest.mark.usefixtures("aws_keys")

DEMAND = Priority.DEMAND
FAST = StoreSettings(retry=RetryPolicy(attempts=3, base_s=0.001, retry_after_cap_s=0.01))


def opened_at(server: Scripted, settings: StoreSettings = FAST) -> OpenedStore:
    return open_store(f"s3://{BUCKET}/pre?endpoint={server.base}&region=us-east-1", settings)


def listing(keys: list[str], *, truncated: bool = False, token: str = "", count: int = -1) -> str:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>1</Size><ETag>x</ETag>"
        "<LastModified>2026-11-22T00:00:00.000Z</LastModified></Contents>"
        for key in keys
    )
    following = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return (
        "<?xml version='1.0'?><ListBucketResult>"
        f"<Name>{BUCKET}</Name><KeyCount>{len(keys) if count < 0 else count}</KeyCount>"
        f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{following}{contents}"
        "</ListBucketResult>"
    )


async def listed(pages: list[str | int]) -> list[str]:
    left = iter(pages)

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        page = next(left)
        if isinstance(page, int):
            return s3_error(page, "InternalError")
        return web.Response(text=page, content_type="application/xml")

    async with scripted(answer) as server:
        opened = opened_at(server)
        try:
            return [stat.key async for stat in opened.store.list("r/")]
        finally:
            await opened.close()


async def test_pages_are_followed_and_retried() -> None:
    """G7, G1: two pages, a 500 between them."""
    first = listing(["pre/r/a", "pre/r/b"], truncated=True, token="t1")
    assert await listed([first, 500, listing(["pre/r/c"])]) == ["r/a", "r/b", "r/c"]
    empty_page = listing([], truncated=True, token="t2")
    assert await listed([first, empty_page, listing(["pre/r/c"])]) == ["r/a", "r/b", "r/c"]


AB = ["pre/r/a", "pre/r/b"]


@pytest.mark.parametrize(
    "pages",
    [
        [listing(AB, truncated=True)],
        [listing(AB, truncated=True, token="t"), listing(["pre/r/c"], truncated=True, token="t")],
        [listing(AB, truncated=True, token="t"), listing(["pre/r/b", "pre/r/c"])],
        [listing(AB, truncated=True, token="t"), listing(AB, truncated=True, token="u")],
        [listing(["pre/r/a", "pre/r/a"])],
        [listing(AB, count=3)],
        [listing(["pre/s/a"])],
        [listing(["other/r/a"])],
    ],
    ids=["no-token", "same-token", "repeated-key", "repeated-page", "duplicate", "miscount",
         "foreign", "foreign-prefix"],
)  # fmt: skip
async def test_a_doubtful_listing_raises(pages: list[str | int]) -> None:
    """G7: truncated without a token, repeated keys or pages, foreign keys: an error, not a list."""
    with pytest.raises(OriginProtocol):
        await listed(pages)


@pytest.mark.parametrize("body", ["", "<html>portal</html>", "<?xml version='1.0'?><ListBuck"])
async def test_a_listing_that_is_none(body: str) -> None:
    """G7: a 200 that is no listing is not an empty store."""
    with pytest.raises(Unavailable):
        await listed([body] * 3)


class Uploads:
    """A minimal multipart S3 whose completion a test scripts."""

    def __init__(self, complete: list[str]) -> None:
        self.complete = iter(complete)
        self.parts: dict[int, bytes] = {}
        self.stored: bytes | None = None
        self.aborted = False

    async def __call__(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        query: MultiMapping[str] = request.query
        if request.method == "HEAD":
            if self.stored is None:
                return web.Response(status=404)
            modified = {"Last-Modified": formatdate(usegmt=True)}
            return web.Response(body=self.stored, headers=modified)
        if request.method == "POST" and "uploads" in query:
            return web.Response(text="<I><UploadId>up</UploadId></I>", content_type="text/xml")
        if request.method == "PUT" and "partNumber" in query:
            self.parts[int(query["partNumber"])] = body
            return web.Response(headers={"ETag": '"not-an-md5"'})
        if request.method == "DELETE":
            self.aborted = True
            return web.Response(status=204)
        assert request.method == "POST"
        step = next(self.complete)
        if "stored" in step:
            self.stored = b"".join(self.parts[number] for number in sorted(self.parts))
        if "error200" in step:
            text = "<?xml version='1.0'?>\n<Error><Code>InternalError</Code></Error>"
            return web.Response(text=text, content_type="text/xml")
        if "lost" in step:
            assert request.transport is not None
            request.transport.abort()
        if "404" in step:
            return s3_error(404, "NoSuchUpload")
        return web.Response(
            text="<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>",
            content_type="text/xml",
        )


@pytest.mark.parametrize(
    ("complete", "fine"),
    [
        (["stored"], True),
        (["error200", "stored"], True),
        (["error200"] * 3, False),
        (["lost stored", "404"], True),
        (["lost", "404"], False),
    ],
)
async def test_completion_of_an_upload(tmp_path: Path, complete: list[str], fine: bool) -> None:
    """G8, G9: an error inside a 200 is one; a HEAD resolves a lost answer; ETags are opaque."""
    body = random.Random(9).randbytes((8 << 20) * 2 + 12345)
    source = tmp_path / "pack"
    source.write_bytes(body)
    uploads = Uploads(complete)
    async with scripted(uploads) as server:
        base = opened_at(server)
        client = BucketClient(open_location(server), S3Limits())
        store = S3Store(client, FAST.retry, single_put_bytes=1 << 20)
        if fine:
            assert await store.put("r/pack", source) is True
            assert uploads.stored == body
            assert {len(part) for part in uploads.parts.values()} == {8 << 20, 12345}
            assert not uploads.aborted
        else:
            with pytest.raises(Unavailable):
                await store.put("r/pack", source)
            assert uploads.stored is None and uploads.aborted
        await store.close()
        await base.close()


def open_location(server: Scripted):
    from imagecache.store.open_s3 import parse_s3

    return parse_s3(f"s3://{BUCKET}/pre?endpoint={server.base}&region=us-east-1")[0]


@pytest.mark.parametrize("kind", ["rclone", "moto"])
async def test_large_objects_on_real_servers(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """G8: 65 MiB by default settings go up in parts and come back right, by file and by bytes."""
    server: S3Server = request.getfixturevalue(kind)
    body = random.Random(10).randbytes((65 << 20) + 7)
    source = tmp_path / "pack"
    source.write_bytes(body)
    opened = open_store(server.url("large"))
    assert await opened.store.put("r/pack", source, only_if_absent=True) is True
    assert await opened.store.put("r/pack", b"short", only_if_absent=True) is False
    assert (await opened.store.stat("r/pack")).size == len(body)
    for offset in (0, (8 << 20) - 5, (64 << 20) - 5):
        got = await opened.reader.read("r/pack", offset, 1 << 20, priority=DEMAND)
        assert got == body[offset : offset + (1 << 20)]
    await opened.store.delete("r/pack")
    await opened.close()


SKEW_S = 3600.0


class Skewed:
    """A server whose clock is an hour ahead, and that minds."""

    async def __call__(self, request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        now = time.time() + SKEW_S
        date = formatdate(now, usegmt=True)
        stamp = request.headers.get("X-Amz-Date") or request.query.get("X-Amz-Date", "")
        signed_at = time.strptime(stamp, "%Y%m%dT%H%M%SZ")
        import calendar

        if abs(calendar.timegm(signed_at) - now) > 900:
            if request.method == "HEAD":
                return web.Response(status=403, headers={"Date": date})
            return s3_error(403, "RequestTimeTooSkewed", Date=date)
        if "Range" in request.headers:
            return part(b"0123456789", 2, 5, Date=date)
        return web.Response(
            body=b"0123456789", headers={"Date": date, "Last-Modified": formatdate(usegmt=True)}
        )


@pytest.mark.parametrize("first", ["get", "stat", "read"])
async def test_a_skewed_clock_is_worked_around(first: str) -> None:
    """G10: requests and presigned URLs are signed again by the server's Date."""
    async with scripted(Skewed()) as server:
        opened = opened_at(server)
        calls = {
            "get": lambda: opened.store.get("r/x", limit=10),
            "stat": lambda: opened.store.stat("r/x"),
            "read": lambda: opened.reader.read("r/x", 2, 4, priority=DEMAND),
        }
        await calls[first]()
        assert len(server.seen) == 2
        assert await calls["get"]() == b"0123456789"
        assert (await calls["stat"]()).size == 10  # type: ignore[attr-defined]
        assert await calls["read"]() == b"2345"
        refused_once = len(server.seen)
        assert refused_once == 5
        await opened.close()


def test_date_headers() -> None:
    """G10: what is no date moves no clock."""
    assert abs(parse_date_shift(formatdate(usegmt=True)) or 0.0) < 5
    for text in ("", "yesterday", "Thu, 99 Jan 2026 00:00:00 GMT"):
        assert parse_date_shift(text) is None


async def test_rotated_keys_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: when the keys in the credentials file are rotated, the next refusal reloads them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    valid = "OLDKEY"

    def keep(name: str) -> None:
        credentials.write_text(
            f"[default]\naws_access_key_id = {name}\naws_secret_access_key = secret\n"
        )

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        signed = request.headers.get("Authorization") or request.query.get("X-Amz-Credential", "")
        if f"{valid}/" not in signed:
            return s3_error(403, "InvalidAccessKeyId")
        if "Range" in request.headers:
            return part(b"0123456789", 2, 5)
        return web.Response(body=b"0123456789")

    keep("OLDKEY")
    async with scripted(answer) as server:
        opened = opened_at(server)
        assert await opened.reader.read("r/x", 2, 4, priority=DEMAND) == b"2345"
        assert await opened.store.get("r/x", limit=10) == b"0123456789"
        valid = "NEWKEY"
        keep("NEWKEY")
        assert await opened.reader.read("r/x", 2, 4, priority=DEMAND) == b"2345"
        assert await opened.store.get("r/x", limit=10) == b"0123456789"
        valid = "OTHER"
        with pytest.raises(Denied, match="InvalidAccessKeyId"):
            await opened.store.get("r/x", limit=10)
        with pytest.raises(Denied, match="InvalidAccessKeyId"):
            await opened.reader.read("r/x", 2, 4, priority=DEMAND)
        await opened.close()


async def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: without credentials both planes say so and how to give some."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    opened = open_store(f"s3://{BUCKET}?endpoint=http://127.0.0.1:1", FAST)
    with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
        await opened.store.get("r/x", limit=1)
    with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
        await opened.reader.read("r/x", 0, 1, priority=DEMAND)
    await opened.close()


async def test_a_profile_of_the_sdks_files(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's real world: a named profile, its region and endpoint in the SDK's own files."""
    config = tmp_path / "config"
    config.write_text(
        f"[profile cubes]\nregion = eu-west-3\nendpoint_url = {rclone.endpoint}\n"
        "aws_access_key_id = cubecachetest\naws_secret_access_key = cubecachesecret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    opened = open_store(f"s3://{BUCKET}/profiled?profile=cubes", FAST)
    assert await opened.store.put("r/x", b"0123")
    assert await opened.reader.read("r/x", 1, 2, priority=DEMAND) == b"12"
    await opened.close()
    missing = open_store(f"s3://{BUCKET}?profile=absent", FAST)
    with pytest.raises(Denied, match="absent"):
        await missing.store.stat("r/x")
    await missing.close()


async def test_a_missing_bucket(rclone: S3Server, moto: S3Server) -> None:
    """G11: every verb says that the bucket is missing; none says that the object is."""
    for server in (rclone, moto):
        url = server.url().replace(BUCKET, "no-such-bucket")
        opened = open_store(url, FAST)
        calls: list[Callable[[], object]] = [
            lambda: opened.store.get("r/x", limit=1),
            lambda: opened.store.put("r/x", b""),
            lambda: opened.store.stat("r/x"),
            lambda: opened.reader.read("r/x", 0, 1, priority=DEMAND),
            lambda: first_of(opened),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(Unavailable, match="bucket") as raised:
                await call()  # type: ignore[misc]
            assert "create" in str(raised.value), (server, number)
        report = await probe(opened.store, opened.reader)
        assert not report.readable and not report.usable
        await opened.close()


async def first_of(opened: OpenedStore) -> None:
    async for _ in opened.store.list(""):
        break


async def test_another_region() -> None:
    """G11: a bucket of another region is named, with the setting that cures it."""

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        return s3_error(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-3"})

    async with scripted(answer) as server:
        opened = opened_at(server)
        with pytest.raises(CubecacheError, match="region") as raised:
            await opened.store.get("r/x", limit=1)
        assert not isinstance(raised.value, NotFound)
        await opened.close()


async def test_throttled_control_calls() -> None:
    """G1: 503 SlowDown is Throttled with its Retry-After, tried again and then said."""

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        return s3_error(503, "SlowDown", **{"Retry-After": "3"})

    async with scripted(answer) as server:
        opened = opened_at(server)
        with pytest.raises(Throttled) as raised:
            await opened.store.get("r/x", limit=1)
        assert raised.value.retry_after == 3
        assert server.count("GET") == 3
        await opened.close()


async def test_short_and_long_objects() -> None:
    """G3: a body that ends early is an error of the control plane too."""

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "10"})
        await response.prepare(request)
        await response.write(b"01234")
        assert request.transport is not None
        request.transport.close()
        return response

    async with scripted(answer) as server:
        opened = opened_at(server)
        with pytest.raises(Unavailable):
            await opened.store.get("r/x", limit=100)
        await opened.close()


async def test_probe_of_rclone(rclone: S3Server) -> None:
    """G13: rclone ignores If-None-Match; the probe says so, and puts still mind what is there."""
    opened = open_store(rclone.url("probed"), FAST)
    report = await probe(opened.store, opened.reader)
    assert report.readable and report.usable and not report.atomic_claims
    assert [finding.verb for finding in report.findings if not finding.ok] == ["conditional put"]
    assert await opened.store.put("r/x", b"a", only_if_absent=True) is True
    assert await opened.store.put("r/x", b"b", only_if_absent=True) is False
    assert [stat.key async for stat in opened.store.list("")] == ["r/x"]
    await opened.close()


async def test_probe_of_moto(moto: S3Server) -> None:
    """G13: a server that honours If-None-Match is found to; nothing of the probe stays."""
    opened = open_store(moto.url("probed"), FAST)
    report = await probe(opened.store, opened.reader)
    assert all(finding.ok for finding in report.findings), report
    assert report.atomic_claims
    left = plain_client(moto).list_objects_v2(Bucket=BUCKET, Prefix="probed/")
    assert left["KeyCount"] == 0
    await opened.close()


class Policed:
    """A tiny S3 that refuses one permission, or conditional puts."""

    def __init__(self, refused: str = "", *, conditions: str = "honoured") -> None:
        self.refused = refused
        self.conditions = conditions
        self.objects: dict[str, bytes] = {}

    def permission(self, request: web.BaseRequest) -> str:
        if request.method == "PUT":
            return "s3:PutObject"
        if request.method == "DELETE":
            return "s3:DeleteObject"
        return "s3:ListBucket" if re.fullmatch(rf"/{BUCKET}/?", request.path) else "s3:GetObject"

    async def __call__(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        permission = self.permission(request)
        if permission == self.refused:
            return s3_error(403, "AccessDenied")
        key = request.path.removeprefix(f"/{BUCKET}/")
        match permission:
            case "s3:ListBucket":
                return web.Response(text=listing(sorted(self.objects)), content_type="text/xml")
            case "s3:PutObject":
                if "If-None-Match" in request.headers:
                    if self.conditions == "501":
                        return s3_error(501, "NotImplemented")
                    if self.conditions == "honoured" and key in self.objects:
                        return s3_error(412, "PreconditionFailed")
                self.objects[key] = body
                return web.Response()
            case "s3:DeleteObject":
                self.objects.pop(key, None)
                return web.Response(status=204)
        if key not in self.objects:
            return s3_error(404, "NoSuchKey")
        stored = self.objects[key]
        if "Range" in request.headers:
            first, _, last = request.headers["Range"][6:].partition("-")
            return part(stored, int(first), int(last))
        return web.Response(body=stored, headers={"Last-Modified": formatdate(usegmt=True)})


@pytest.mark.parametrize(
    "permission", ["s3:PutObject", "s3:GetObject", "s3:ListBucket", "s3:DeleteObject"]
)
async def test_the_missing_permission_is_named(permission: str) -> None:
    """G11: with one permission missing the probe names that one and finds the others working."""
    async with scripted(Policed(permission)) as server:
        opened = opened_at(server)
        report = await probe(opened.store, opened.reader)
        said = " ".join(f"{finding.words} {finding.remedy}" for finding in report.findings)
        assert permission in said
        others = {"s3:PutObject", "s3:GetObject", "s3:ListBucket", "s3:DeleteObject"} - {permission}
        assert not [other for other in others if other in said]
        assert not report.usable
        assert report.readable is (permission != "s3:GetObject")
        await opened.close()


@pytest.mark.parametrize("conditions", ["501", "ignored", "honoured"])
async def test_only_if_absent_whatever_the_server_knows(conditions: str) -> None:
    """G13: refused, ignored and honoured conditions all keep what is there."""
    policed = Policed(conditions=conditions)
    async with scripted(policed) as server:
        opened = opened_at(server)
        assert await opened.store.put("r/x", b"first", only_if_absent=True) is True
        assert await opened.store.put("r/x", b"second", only_if_absent=True) is False
        assert policed.objects == {"pre/r/x": b"first"}
        assert await opened.store.claims_are_atomic() is (conditions == "honoured")
        await opened.close()


async def test_the_loser_of_an_unguarded_race_finds_out() -> None:
    """G13: where conditions are ignored, a claim overwritten between put and look-back is lost."""

    class Overwriting(Policed):
        async def __call__(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
            answer = await super().__call__(request, body)
            if request.method == "PUT" and request.path.endswith("/r/claim"):
                self.objects["pre/r/claim"] = b"another host"
            return answer

    async with scripted(Overwriting(conditions="ignored")) as server:
        opened = opened_at(server)
        assert await opened.store.put("r/claim", b"this host", only_if_absent=True) is False
        await opened.close()
