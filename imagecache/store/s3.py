"""A store in an S3 bucket: the control plane. Ranges are read by the range client.

Integrity never rests on an ETag (catalogue G9). `only_if_absent` uses If-None-Match where the
server honours it; where it does not, a look before the put, and for small bodies a read after it,
make a wrong True unlikely, and `claims_are_atomic` says that it is not more than that (G13).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagecache.errors import CubecacheError, Denied, LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.store.base import ObjectStat, OriginProtocol, check_key, check_prefix
from imagecache.store.policy import RetryPolicy, retryable
from imagecache.store.remembered import Remembered
from imagecache.store.s3_client import BucketClient
from imagecache.store.s3_errors import AlreadyThere, ConditionUnsupported
from imagecache.store.s3_multipart import MultipartUpload, Piece

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

SINGLE_PUT_BYTES = 64 << 20
PROBE_PREFIX = "probe"
_COMPARE_BYTES = 1 << 20
_MAX_PAGES = 1_000_000
_ATOMIC = "conditional puts are honoured"


class S3Store:
    """Control plane of one location; single attempts, but for listing pages and upload parts."""

    def __init__(
        self,
        client: BucketClient,
        policy: RetryPolicy,
        *,
        single_put_bytes: int = SINGLE_PUT_BYTES,
        dice: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        remembered: Remembered | None = None,
    ) -> None:
        """`remembered` spares other processes of this host the probe of conditional puts."""
        self._remembered = remembered or Remembered(None)
        self._client = client
        self._bucket = client.location.bucket
        self._full_key = client.location.full_key
        self._policy = policy
        self._single_put_bytes = single_put_bytes
        self._dice = dice or random.Random()
        self._sleep = sleep
        self._atomic: bool | None = None
        self._bucket_seen = False

    async def get(self, key: str, *, limit: int) -> bytes:
        """The whole object; NotFound, LimitExceeded."""
        full_key = self._full_key(check_key(key))

        def work(client: S3Client) -> bytes:
            answer = client.get_object(Bucket=self._bucket, Key=full_key)
            with contextlib.closing(answer["Body"]) as stream:
                declared = answer.get("ContentLength")
                if declared is not None and declared > limit:
                    raise LimitExceeded(f"object {key} is {declared} bytes, over {limit}")
                body = stream.read(limit + 1)
            if len(body) > limit:
                raise LimitExceeded(f"object {key} is over the limit of {limit} bytes")
            if declared is not None and len(body) != declared:
                raise OriginProtocol(f"object {key} came with {len(body)} of {declared} bytes")
            return body

        return await self._client.call("GetObject", key, work)

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """Write the object; False when `only_if_absent` found one."""
        check_key(key)
        piece = await asyncio.to_thread(_measured, body)
        if not only_if_absent:
            await self._put(key, piece, conditional=False)
            return True
        small = piece.length <= _COMPARE_BYTES
        atomic = await self.claims_are_atomic()
        if not (small and atomic) and await self._exists(key):
            return False
        try:
            await self._put(key, piece, conditional=atomic)
        except AlreadyThere:
            return False
        except ConditionUnsupported:  # known for a put, but not for the end of an upload
            await self._put(key, piece, conditional=False)
        return atomic or not small or await self._is_ours(key, piece)

    async def stat(self, key: str) -> ObjectStat:
        """Size and time of one object; NotFound."""
        full_key = self._full_key(check_key(key))
        try:
            answer = await self._client.call(
                "HeadObject",
                key,
                lambda client: client.head_object(Bucket=self._bucket, Key=full_key),
            )
        except NotFound:
            await self._see_bucket()  # a HEAD's 404 does not say what is missing
            raise
        self._bucket_seen = True
        return ObjectStat(key, answer["ContentLength"], answer["LastModified"].timestamp())

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Every object under `prefix`; OriginProtocol where the pages cannot be complete (G7)."""
        full_prefix = self._full_key(check_prefix(prefix))
        strip = len(self._full_key(""))
        token: str | None = None
        first_keys: set[str] = set()
        last_page: frozenset[str] = frozenset()
        for _ in range(_MAX_PAGES):
            page = await self._page(prefix, full_prefix, token)
            if "IsTruncated" not in page:  # an empty body or a portal's page parses as no keys
                raise OriginProtocol(f"the answer for {prefix!r} is no listing")
            found = [_listed(entry, full_prefix) for entry in page.get("Contents", [])]
            keys = frozenset(stat.key for stat in found)
            if (
                len(keys) != len(found)
                or keys & last_page
                or (found and found[0].key in first_keys)
            ):
                raise OriginProtocol(f"the listing of {prefix!r} repeats keys")
            if page.get("KeyCount", len(found)) != len(found):
                raise OriginProtocol(f"the listing of {prefix!r} miscounts its keys")
            for stat in found:
                yield ObjectStat(stat.key[strip:], stat.size, stat.modified)
            following = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not following or following == token:
                raise OriginProtocol(f"the listing of {prefix!r} is cut short without a way on")
            if found:
                first_keys.add(found[0].key)
                last_page = keys
            token = following
        raise OriginProtocol(f"the listing of {prefix!r} does not end")

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        full_key = self._full_key(check_key(key))
        with contextlib.suppress(NotFound):
            await self._client.call(
                "DeleteObject",
                key,
                lambda client: client.delete_object(Bucket=self._bucket, Key=full_key),
            )

    async def claims_are_atomic(self) -> bool:
        """True when a second conditional put of one probe object was refused; asked once."""
        where = f"{self._client.location.endpoint} {self._client.location}"
        if self._atomic is None:
            self._atomic = await asyncio.to_thread(self._remembered.load, where, _ATOMIC)
        if self._atomic is None:
            key = f"{PROBE_PREFIX}/{secrets.token_hex(16)}"
            piece = Piece(b"probe", 0, 5)
            try:
                await self._put(key, piece, conditional=True)
                await self._put(key, piece, conditional=True)
                self._atomic = False  # the condition was ignored
            except AlreadyThere:
                self._atomic = True
            except ConditionUnsupported:
                self._atomic = False
            finally:
                with contextlib.suppress(CubecacheError):
                    await self.delete(key)
            await asyncio.to_thread(self._remembered.save, where, _ATOMIC, self._atomic)
        return self._atomic

    async def close(self) -> None:
        """End the client's threads and connections."""
        await self._client.close()

    async def _exists(self, key: str) -> bool:
        try:
            await self.stat(key)
        except NotFound:
            return False
        except Denied:
            return False  # HEAD needs s3:GetObject; a writer without it still has the condition
        return True

    async def _put(self, key: str, piece: Piece, *, conditional: bool) -> None:
        if piece.length > self._single_put_bytes:
            upload = MultipartUpload(self._client, key, piece, self._patiently)
            await upload.run(conditional)
            return
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if conditional else {}
        full_key = self._full_key(key)

        def work(client: S3Client) -> None:
            with piece.opened() as body:
                client.put_object(Bucket=self._bucket, Key=full_key, Body=body, **condition)

        await self._client.call("PutObject", key, work)

    async def _is_ours(self, key: str, piece: Piece) -> bool:
        """Without a condition the last of two writers wins; the first finds out here."""
        try:
            stored = await self.get(key, limit=piece.length)
        except (LimitExceeded, NotFound):
            return False
        except Denied:
            return True  # write-only credentials: the look before must do
        return stored == await asyncio.to_thread(piece.content)

    async def _see_bucket(self) -> None:
        """Raise Unavailable when the bucket itself is missing; asked once."""
        if self._bucket_seen:
            return
        try:
            await self._client.call(
                "HeadBucket", "", lambda client: client.head_bucket(Bucket=self._bucket)
            )
        except NotFound as error:
            raise Unavailable(
                f"bucket {self._bucket} does not exist", remedy="create the bucket"
            ) from error
        except Denied:
            return  # no permission to ask: believe the object's 404
        self._bucket_seen = True

    async def _page(self, prefix: str, full_prefix: str, token: str | None) -> Any:
        following: dict[str, Any] = {"ContinuationToken": token} if token else {}
        return await self._patiently(
            lambda: self._client.call(
                "ListObjectsV2",
                prefix,
                lambda client: client.list_objects_v2(
                    Bucket=self._bucket, Prefix=full_prefix, MaxKeys=1000, **following
                ),
            )
        )

    async def _patiently(self, call: Callable[[], Awaitable[Any]]) -> Any:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await call()
            except CubecacheError as error:
                if not retryable(error) or attempt >= self._policy.attempts:
                    raise
                delay_s = self._policy.delay_s(attempt, error, self._dice)
            await self._sleep(delay_s)


def _measured(body: bytes | Path) -> Piece:
    if isinstance(body, bytes):
        return Piece(body, 0, len(body))
    try:
        return Piece(body, 0, body.stat().st_size)
    except OSError as error:
        raise Rejected(f"file {body} to be stored cannot be read: {error.strerror}") from error


def _listed(entry: Any, prefix: str) -> ObjectStat:
    try:
        key, size = str(entry["Key"]), int(entry["Size"])
        modified = float(entry["LastModified"].timestamp())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OriginProtocol(f"the listing of {prefix!r} has an unreadable entry") from error
    if not key.startswith(prefix) or size < 0:
        raise OriginProtocol(f"the listing of {prefix!r} has a foreign entry {key[:80]!r}")
    return ObjectStat(key, size, modified)
