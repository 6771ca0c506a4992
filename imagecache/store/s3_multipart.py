"""Uploads over 64 MiB: parts of 8 MiB, the one size that UCloud US3 takes too."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from imagecache.errors import CubecacheError, LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.store.s3_client import BucketClient
from imagecache.store.s3_errors import NoSuchUpload

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4

Patiently = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes, of a buffer or of a file: offset and length in bytes."""

    source: bytes | Path
    offset: int
    length: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The piece as a seekable stream (over 8 MiB: of a whole file); blocking."""
        if isinstance(self.source, bytes) or self.length <= PART_BYTES:
            yield io.BytesIO(self.content())
            return
        with self.source.open("rb") as opened:  # a whole file: never in memory as one
            if os.fstat(opened.fileno()).st_size != self.length:
                raise Rejected(f"file {self.source} changed while it was stored")
            yield opened

    def content(self) -> bytes:
        """The piece's bytes; blocking; Rejected when the file has shrunk or gone."""
        if isinstance(self.source, bytes):
            return self.source[self.offset : self.offset + self.length]
        try:
            with self.source.open("rb") as opened:
                opened.seek(self.offset)
                body = opened.read(self.length)
        except OSError as error:
            raise Rejected(f"file {self.source} to be stored cannot be read: {error}") from error
        if len(body) != self.length:
            raise Rejected(f"file {self.source} shrank while it was stored")
        return body


class MultipartUpload:
    """One object in parts; aborted when it does not end, so that no parts are left to pay for."""

    def __init__(self, client: BucketClient, key: str, piece: Piece, patiently: Patiently) -> None:
        self._client = client
        self._key = key
        self._piece = piece
        self._patiently = patiently
        self._where: dict[str, Any] = {
            "Bucket": client.location.bucket,
            "Key": client.location.full_key(key),
        }

    async def run(self, conditional: bool) -> None:
        """Upload and complete; AlreadyThere when `conditional` and an object is there."""
        parts = cut(self._piece)
        created = await self._call(
            "CreateMultipartUpload", lambda client: client.create_multipart_upload(**self._where)
        )
        upload: dict[str, Any] = {**self._where, "UploadId": str(created["UploadId"])}
        try:
            done = await self._send(upload, parts)
            await self._complete(upload, done, conditional)
        except BaseException:
            # Also when cancelled; the bucket's life-cycle rule is the net below this one.
            with contextlib.suppress(CubecacheError, NoSuchUpload):
                await asyncio.shield(self._abort(upload))
            raise

    async def _send(self, upload: dict[str, Any], parts: list[Piece]) -> list[CompletedPartTypeDef]:
        places = asyncio.Semaphore(_PARTS_AT_ONCE)

        async def send(number: int, part: Piece) -> CompletedPartTypeDef:
            def work(client: S3Client) -> str:
                with part.opened() as body:
                    answer = client.upload_part(**upload, PartNumber=number, Body=body)
                return answer["ETag"]

            async with places:
                etag = await self._patiently(lambda: self._call("UploadPart", work))
            return {"PartNumber": number, "ETag": etag}

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(send(n, part)) for n, part in enumerate(parts, 1)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def _complete(
        self, upload: dict[str, Any], parts: list[CompletedPartTypeDef], conditional: bool
    ) -> None:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if conditional else {}

        def work(client: S3Client) -> None:
            client.complete_multipart_upload(
                **upload,
                **condition,
                MultipartUpload={"Parts": parts},
            )

        try:
            await self._patiently(lambda: self._call("CompleteMultipartUpload", work))
        except NoSuchUpload as error:
            # Catalogue G8: the answer of a completion that happened was lost. HEAD resolves it.
            if await self._stored_bytes() != self._piece.length:
                raise Unavailable(f"the upload of {self._key} was lost") from error

    async def _stored_bytes(self) -> int:
        try:
            answer = await self._call(
                "HeadObject", lambda client: client.head_object(**self._where)
            )
        except NotFound:
            return -1
        return int(answer["ContentLength"])

    async def _abort(self, upload: dict[str, Any]) -> None:
        await self._call(
            "AbortMultipartUpload",
            lambda client: client.abort_multipart_upload(**upload),
        )

    async def _call(self, operation: str, work: Callable[[S3Client], Any]) -> Any:
        return await self._client.call(operation, self._key, work)


def cut(piece: Piece) -> list[Piece]:
    """The parts of an upload in order; LimitExceeded over 10,000 parts of 8 MiB (78 GiB)."""
    if piece.length > MAX_PARTS * PART_BYTES:
        raise LimitExceeded(f"an object of {piece.length} bytes is too large to be stored")
    return [
        Piece(piece.source, piece.offset + start, min(PART_BYTES, piece.length - start))
        for start in range(0, piece.length, PART_BYTES)
    ]
