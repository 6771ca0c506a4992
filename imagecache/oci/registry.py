"""A registry's repository as an image source: the distribution API's pull side over HTTP.

Source: OCI distribution specification, pull. State: one transport, one authorization, one small
thread pool for files; all end with `close()`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from aiohttp.abc import AbstractResolver
from multidict import CIMultiDictProxy
from yarl import URL

from imagecache.errors import Denied, LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.oci import mediatypes
from imagecache.oci.credentials import Credentials, find_credentials
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.digest import Digest
from imagecache.oci.download import Ask, BlobDownload, Progress, wait_seconds
from imagecache.oci.origin import registry_origin
from imagecache.oci.partial import PartialBlob
from imagecache.oci.platform import Platform
from imagecache.oci.reference import RegistryReference, is_tag
from imagecache.oci.resolution import Received, ResolvedImage, resolve_top
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.strictjson import parse_object
from imagecache.oci.tokens import Authorization, read_capped
from imagecache.oci.transport import Reply, Retryable, Transport, check_status

_log = logging.getLogger(__name__)
_TAGS_PER_PAGE = 1000
_TAG_PAGES = 100
_NEXT_PAGE = re.compile(r"<[^<>?]{0,2000}\?([!-;=?-~]{1,2000})>\s*;\s*rel=\"?next")
_TOKEN_ATTEMPTS = 2
_WORKERS = 4


class RegistrySource:
    """Images of one repository; made inside a running loop."""

    def __init__(
        self,
        reference: RegistryReference,
        settings: RegistrySettings,
        *,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._reference = reference
        self._settings = settings
        self._limits = settings.limits
        self._throttle = settings.throttle
        self._home = registry_origin(reference.host, settings)
        self._transport = Transport(self._home, settings, resolver=resolver)
        self._authorization = Authorization(
            self._transport, reference.repository, settings, self._credentials
        )
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="oci-blob")

    async def close(self) -> None:
        """Close connections and threads; downloads must have ended."""
        await self._authorization.close()
        await self._transport.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def resolve(self, platform: Platform) -> ResolvedImage:
        """Resolve the reference to one image; its digest pins all that follows."""
        name = self._reference.canonical
        received = await self._top(f"manifest of {name}")
        return await resolve_top(self, received, name=name, wanted=platform, limits=self._limits)

    async def tags(self) -> list[str]:
        """The repository's tags, as the registry orders them; LimitExceeded over 100,000.

        Source: the distribution specification, content discovery. What is no tag is left out.
        """
        what = f"tags of {self._reference.host}/{self._reference.repository}"
        base = f"/v2/{self._reference.repository}/tags/list"
        found: dict[str, None] = {}
        query = f"n={_TAGS_PER_PAGE}"
        for _ in range(_TAG_PAGES):
            raw, headers = await self._read_small(
                f"{base}?{query}", "application/json", self._limits.manifest_bytes, what
            )
            listed = parse_object(raw, limit=self._limits.manifest_bytes, what=what).get("tags")
            names = listed if isinstance(listed, list) else []
            found |= dict.fromkeys(x for x in names if isinstance(x, str) and is_tag(x))
            # Only the query of the next page's link: nobody sends us to another place.
            link = _NEXT_PAGE.search(headers.get("Link", ""))
            if link is None:
                return list(found)
            query = link[1]
        raise LimitExceeded(f"{what} have more than {_TAG_PAGES} pages")

    async def read_manifest(self, descriptor: Descriptor) -> Received:
        """Part of `ManifestReader`: a child manifest, by digest."""
        if descriptor.inline is not None:
            return Received(descriptor.inline, descriptor.digest, None)
        what = f"manifest {descriptor.digest} of {self._reference.canonical}"
        raw, headers = await self._manifest(str(descriptor.digest), what)
        descriptor.verify(raw, what)
        return Received(raw, descriptor.digest, headers.get("Content-Type"))

    async def read_config(self, descriptor: Descriptor) -> bytes:
        """Part of `ManifestReader`: a configuration blob."""
        if descriptor.inline is not None:
            return descriptor.inline
        what = f"config {descriptor.digest} of {self._reference.canonical}"
        raw, _ = await self._read_small(
            self._blob_path(descriptor.digest), "*/*", self._limits.config_bytes, what
        )
        return descriptor.verify(raw, what)

    async def fetch_blob(self, descriptor: Descriptor, target: Path, progress: Progress) -> None:
        """Bring a blob to `target`, from the registry, or a foreign layer from its URLs.

        See `BlobDownload.run` for progress, errors and what stays behind.
        """
        what = f"blob {descriptor.digest} of {self._reference.canonical}"
        if descriptor.size > self._limits.blob_bytes:
            raise LimitExceeded(f"{what} has more than {self._limits.blob_bytes} bytes")
        if descriptor.inline is not None:
            await asyncio.get_running_loop().run_in_executor(
                self._executor, _write_inline, descriptor, descriptor.inline, target
            )
            progress(descriptor.size)
            return
        path = self._blob_path(descriptor.digest)

        def from_registry(headers: Mapping[str, str]) -> AbstractAsyncContextManager[Reply]:
            return self._exchange(path, headers, what)

        try:
            await self._download(from_registry, descriptor, target, progress, what)
        except NotFound:
            if not descriptor.urls:
                raise
            await self._fetch_foreign(descriptor, target, progress, what)

    async def _fetch_foreign(
        self, descriptor: Descriptor, target: Path, progress: Progress, what: str
    ) -> None:
        """A foreign layer from the URLs of its descriptor: no credentials, public places only."""
        if not self._settings.foreign_urls:
            raise NotFound(
                f"{what}: the registry does not have this foreign layer",
                remedy="allow foreign layer URLs if they are to be fetched elsewhere",
            )
        problem: Exception | None = None
        for text in descriptor.urls:
            try:
                url = URL(text, encoded=True)
                if url.scheme != "https" or url.raw_user or url.raw_password or not url.host:
                    raise ValueError(text)
            except ValueError:
                problem = Denied(f"{what}: refusing a foreign layer URL that is not plain https")
                continue

            def elsewhere(
                headers: Mapping[str, str], url: URL = url
            ) -> AbstractAsyncContextManager[Reply]:
                return self._anonymous(url, headers, what)

            try:
                await self._download(elsewhere, descriptor, target, progress, what)
                return
            except (NotFound, Denied, Unavailable, Rejected) as error:
                problem = error
        raise problem or NotFound(f"{what}: nowhere to be had")

    async def _download(
        self, ask: Ask, descriptor: Descriptor, target: Path, progress: Progress, what: str
    ) -> None:
        await BlobDownload(
            ask,
            descriptor,
            target,
            progress=progress,
            limits=self._limits,
            executor=self._executor,
            what=what,
            throttle=self._throttle,
        ).run()

    async def _top(self, what: str) -> Received:
        """The manifest that the reference itself names."""
        raw, headers = await self._manifest(self._reference.selector, what)
        told = headers.get("Content-Type")
        pinned = self._reference.digest
        computed = Digest.of(raw, pinned.algorithm if pinned is not None else "sha256")
        if pinned is not None:
            if computed != pinned:
                raise Rejected(f"{what} does not match its digest {pinned}")
            self._compare_header(headers, raw, what)
            return Received(raw, pinned, told)
        if not self._compare_header(headers, raw, what):
            # A tag vouches for nothing: ask for what we got by its own digest. If the registry
            # has that, its header was wrong; if not, the body was (A19, A20).
            try:
                again, _ = await self._manifest(str(computed), what)
            except NotFound:
                again = b""
            if again != raw:
                raise Rejected(f"{what} does not match the registry's own digest header")
        return Received(raw, computed, told)

    def _compare_header(self, headers: CIMultiDictProxy[str], raw: bytes, what: str) -> bool:
        """Whether Docker-Content-Digest agrees with the body; absent and unusable ones do."""
        said = headers.get("Docker-Content-Digest")
        if said is None:
            return True
        try:
            digest = Digest.parse(said)
        except Rejected:
            digest = None
        if digest is not None and Digest.of(raw, digest.algorithm) == digest:
            return True
        _log.warning("%s: the registry's digest header does not match its body", what)
        return digest is None

    async def _manifest(self, selector: str, what: str) -> tuple[bytes, CIMultiDictProxy[str]]:
        path = f"/v2/{self._reference.repository}/manifests/{selector}"
        return await self._read_small(path, mediatypes.ACCEPT, self._limits.manifest_bytes, what)

    def _blob_path(self, digest: Digest) -> str:
        return f"/v2/{self._reference.repository}/blobs/{digest}"

    async def _read_small(
        self, path: str, accept: str, limit: int, what: str
    ) -> tuple[bytes, CIMultiDictProxy[str]]:
        """A whole small body and its headers, retried within one deadline."""
        failures = 0
        try:
            async with asyncio.timeout(self._limits.small_seconds):
                while True:
                    try:
                        async with self._exchange(path, {"Accept": accept}, what) as reply:
                            if reply.status != 200:
                                raise Rejected(f"{what}: unexpected status {reply.status}")
                            length = reply.response.content_length
                            if length is not None and length > limit:
                                raise LimitExceeded(f"{what} has more than {limit} bytes")
                            raw = await read_capped(reply.response.content, limit, what)
                            return raw, reply.response.headers
                    except Retryable as error:
                        failures += 1
                        if failures >= self._limits.attempts:
                            raise
                        await asyncio.sleep(
                            wait_seconds(error.retry_after, failures - 1, self._limits)
                        )
        except TimeoutError:
            raise Unavailable(
                f"{what}: no complete answer within {self._limits.small_seconds:g} s"
            ) from None

    @asynccontextmanager
    async def _exchange(
        self, path: str, headers: Mapping[str, str], what: str
    ) -> AsyncIterator[Reply]:
        """A GET with authorization: at most two tokens for a 401, one second look for a 403."""
        renewals = 0
        looked_again = False
        url = self._home.url(path)
        while True:
            value = await self._authorization.current()
            async with self._transport.send(
                url, headers=headers, authorization=value, what=what
            ) as reply:
                unauthorized = reply.status == 401 and reply.at_home
                forbidden = reply.status == 403 and (
                    not reply.at_home or self._authorization.can_renew()
                )
                if not (unauthorized and renewals < _TOKEN_ATTEMPTS) and not (
                    forbidden and not looked_again
                ):
                    check_status(reply, what)
                    yield reply
                    return
                challenges = reply.response.headers.getall("WWW-Authenticate", [])
            if unauthorized:
                renewals += 1
                await self._authorization.renew(value, challenges)
            else:
                # An aged token, or a presigned URL that has run out: once more from the start.
                looked_again = True
                if self._authorization.can_renew():
                    await self._authorization.renew(value, ())

    @asynccontextmanager
    async def _anonymous(
        self, url: URL, headers: Mapping[str, str], what: str
    ) -> AsyncIterator[Reply]:
        async with self._transport.send(url, headers=headers, what=what) as reply:
            check_status(reply, what)
            yield reply

    async def _credentials(self) -> Credentials | None:
        return await find_credentials(
            self._reference.host,
            self._settings.docker_config,
            helper_path=self._settings.helper_path,
            helper_seconds=self._limits.helper_seconds,
        )


def _write_inline(descriptor: Descriptor, body: bytes, target: Path) -> None:
    """Put content that its descriptor carried (verified when it was parsed) at `target`."""
    blob = PartialBlob(target, descriptor.digest, descriptor.size)
    blob.open()
    try:
        blob.restart()
        blob.append([body])
        if not blob.commit():
            blob.discard()
            raise Rejected(f"the inline content of {descriptor.digest} does not match")
    finally:
        blob.close()
