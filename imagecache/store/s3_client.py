"""One bucket through boto3: credentials, signing by the server's clock, calls in own threads.

boto3's own retries are off (our wrappers retry), its checksum features are only as strong as
required (catalogue G4). A client is made in a thread, because that reads files and may ask a
metadata service; it is made again when credentials were refused, so rotated ones are found.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore import auth as boto_auth
from botocore import exceptions as boto
from botocore.config import Config

from imagecache.errors import Unavailable
from imagecache.store.s3_errors import (
    CREDENTIAL_CODES,
    SKEW_CODES,
    code_of,
    header_of,
    mapped,
    status_of,
)
from imagecache.store.settings import S3Limits

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")

URL_LIFE_S = 3600
_RELOAD_S = 30.0
_SAME_RELOAD_S = 2.0  # calls that were refused together share one reload
_SKEW_S = 240.0  # servers refuse at 15 minutes, some at 5
_SIGNED = ("v4", "s3v4", "v4-query", "s3v4-query")
_SHIFT = "cubecache_clock_shift_s"


@dataclass(frozen=True, slots=True)
class S3Location:
    """Where a bucket is; None leaves the choice to the SDK's chain (environment, files, role)."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def full_key(self, key: str) -> str:
        """The bucket's key of a store's key."""
        return f"{self.prefix}/{key}" if self.prefix else key


class _ShiftedSigner(boto_auth.S3SigV4Auth):
    """SigV4 by the server's clock instead of ours."""

    def _modify_request_before_signing(self, request: Any) -> None:
        _shift(request)
        super()._modify_request_before_signing(request)  # type: ignore[misc]  # the stubs leave the hook out


class _ShiftedQuerySigner(boto_auth.S3SigV4QueryAuth):
    """Presigning by the server's clock."""

    def _modify_request_before_signing(self, request: Any) -> None:
        _shift(request)
        super()._modify_request_before_signing(request)  # type: ignore[misc]  # the stubs leave the hook out


boto_auth.AUTH_TYPE_MAPS["cubecache-s3v4"] = _ShiftedSigner
boto_auth.AUTH_TYPE_MAPS["cubecache-s3v4-query"] = _ShiftedQuerySigner


def _shift(request: Any) -> None:
    stamp = datetime.now(UTC) + timedelta(seconds=request.context.get(_SHIFT, 0.0))
    request.context["timestamp"] = stamp.strftime(boto_auth.SIGV4_TIMESTAMP)


class BucketClient:
    """boto3 for one location. Blocking work runs in its threads, errors come out as ours."""

    def __init__(
        self, location: S3Location, limits: S3Limits, *, ca_file: Path | None = None
    ) -> None:
        self.location = location
        self._limits = limits
        self._ca_file = ca_file
        self._threads = ThreadPoolExecutor(limits.threads, thread_name_prefix="store-s3")
        self._making = threading.Lock()
        self._client: S3Client | None = None
        self._reloaded_at = -_RELOAD_S
        self._shift_s = 0.0
        self._temporary = False

    @property
    def credentials_are_temporary(self) -> bool:
        """True when the last client's credentials carry a session token, so may end early."""
        return self._temporary

    async def call(self, operation: str, key: str, work: Callable[[S3Client], T]) -> T:
        """`work` with the client, in a thread; `operation` and `key` are for messages.

        Raises our errors and the three marker exceptions of `s3_errors`. A refusal for the clock or
        the credentials is healed and tried once more.
        """
        loop = asyncio.get_running_loop()
        what = f"{self.location}/{key}".rstrip("/")

        def run() -> T:
            try:
                return self._healed(work)
            except Exception as error:
                raise mapped(error, operation, what) from error

        try:
            async with asyncio.timeout(self._limits.call_s):
                return await loop.run_in_executor(self._threads, run)
        except TimeoutError as error:
            raise Unavailable(
                f"{operation} of {what} took over {self._limits.call_s:g} s"
            ) from error

    async def presign(self, key: str) -> str:
        """A URL that gets the object, good for `URL_LIFE_S` unless the credentials end earlier."""
        params = {"Bucket": self.location.bucket, "Key": self.location.full_key(key)}
        return await self.call(
            "GetObject",
            key,
            lambda client: client.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=URL_LIFE_S
            ),
        )

    def heal(self, code: str, status: int, date: str) -> bool:
        """True when a refusal may be cured: the clock was shifted, or new credentials are loaded.

        `date` is the server's Date header. May block (credentials): for threads only.
        """
        shift_s = parse_date_shift(date)
        if shift_s is not None and (code in SKEW_CODES or abs(shift_s - self._shift_s) > _SKEW_S):
            moved = abs(shift_s - self._shift_s) > 1.0
            self._shift_s = shift_s
            return moved
        refused = code in CREDENTIAL_CODES or (status == 403 and code in ("", "403"))
        if not refused:
            return False
        with self._making:
            if time.monotonic() - self._reloaded_at >= _RELOAD_S:
                self._client = None
                self._reloaded_at = time.monotonic()
            return time.monotonic() - self._reloaded_at < _SAME_RELOAD_S

    async def heal_soon(self, code: str, status: int, date: str) -> bool:
        """`heal` in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.heal, code, status, date)

    async def close(self) -> None:
        """End the threads after what they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def _healed(self, work: Callable[[S3Client], T]) -> T:
        try:
            return work(self._ready())
        except boto.ClientError as error:
            status = status_of(error)
            if status not in (400, 401, 403):
                raise
            if not self.heal(code_of(error), status, header_of(error, "date")):
                raise
        return work(self._ready())

    def _ready(self) -> S3Client:
        client = self._client
        if client is None:
            with self._making:
                if self._client is None:
                    self._client = self._make()
                client = self._client
        return client

    def _make(self) -> S3Client:
        location = self.location
        session = boto3.session.Session(profile_name=location.profile)
        credentials = session.get_credentials()
        self._temporary = bool(credentials and credentials.get_frozen_credentials().token)
        path_style = location.path_style
        if path_style is None and location.endpoint is not None:
            path_style = True
        client = self._make_styled(session, path_style)
        if path_style is None and not _is_aws(client.meta.endpoint_url):
            client.close()  # the endpoint came from the environment or a file
            client = self._make_styled(session, True)
        # The stubs know events without answers only.
        client.meta.events.register("choose-signer.s3", _choose_signer)  # type: ignore[arg-type]
        client.meta.events.register("before-sign.s3", self._note_shift)
        return client

    def _make_styled(self, session: boto3.session.Session, path_style: bool | None) -> S3Client:
        styles: dict[bool | None, Literal["auto", "path", "virtual"]]
        styles = {None: "auto", True: "path", False: "virtual"}
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": styles[path_style]},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=self._limits.connect_s,
            read_timeout=self._limits.read_s,
            max_pool_connections=self._limits.threads,
        )
        return session.client(
            "s3",
            endpoint_url=self.location.endpoint,
            region_name=self.location.region or session.region_name or "us-east-1",
            verify=str(self._ca_file) if self._ca_file else None,
            config=config,
        )

    def _note_shift(self, request: Any, **_: Any) -> None:
        request.context[_SHIFT] = self._shift_s


def _choose_signer(signature_version: Any, **_: Any) -> str | None:
    """Ours for plain SigV4; express, anonymous and SigV4A ones stay."""
    return "cubecache-s3v4" if signature_version in _SIGNED else None


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def parse_date_shift(date: str) -> float | None:
    """Seconds that the clock of a Date header is ahead of ours; None for what is no date."""
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except (ValueError, TypeError):
        return None
