"""What a store can do, tried on a scratch object: for `doctor store` and start-up checks.

Catalogue G11 and G13: every missing permission is named in words, and conditional puts are tried,
not believed.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable
from imagecache.store.base import Priority, RangeReader, Store

_PREFIX = "probe"
_BODY_BYTES = 70_000
_OFFSET, _LENGTH = 4096, 65_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried: `ok`, what it is in words, and for a failure why and what to do."""

    verb: str
    ok: bool
    words: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class StoreReport:
    """All findings, in the order tried. `usable` for builders, `readable` for readers alone."""

    findings: tuple[Finding, ...]

    @property
    def readable(self) -> bool:
        """Objects and ranges can be read."""
        return self._all("get", "ranges")

    @property
    def usable(self) -> bool:
        """A builder can work here; conditional puts are wanted, not needed."""
        return self.readable and self._all("put", "list", "delete", "stat")

    @property
    def atomic_claims(self) -> bool:
        """Two builders that meet are told apart for certain."""
        return any(finding.ok for finding in self.findings if finding.verb == "conditional put")

    def _all(self, *verbs: str) -> bool:
        return all(finding.ok for finding in self.findings if finding.verb in verbs)


async def probe(store: Store, reader: RangeReader) -> StoreReport:
    """Try every verb on a scratch object, which is deleted again; never raises for a finding."""
    key = f"{_PREFIX}/{secrets.token_hex(16)}"
    body = secrets.token_bytes(_BODY_BYTES)
    findings: list[Finding] = []

    async def attempt(verb: str, words: str, call: Callable[[], Awaitable[bool]]) -> None:
        findings.append(await _tried(verb, words, call))

    async def put() -> bool:
        return await store.put(key, body)

    async def stat() -> bool:
        return (await store.stat(key)).size == len(body)

    async def get() -> bool:
        return await store.get(key, limit=len(body)) == body

    async def ranges() -> bool:
        got = await reader.read(key, _OFFSET, _LENGTH, priority=Priority.DEMAND)
        return got == body[_OFFSET : _OFFSET + _LENGTH]

    async def listing() -> bool:
        return any([found.key == key async for found in store.list(f"{_PREFIX}/")])

    async def delete() -> bool:
        await store.delete(key)
        try:
            await store.stat(key)
        except NotFound:
            return True
        return False

    await attempt("put", "write objects", put)
    written = findings[-1].ok
    if written:
        await attempt("stat", "see an object's size", stat)
        await attempt("get", "read objects", get)
        await attempt("ranges", "read ranges of objects", ranges)
    else:
        findings.append(await _absent(store))
    await attempt("list", "list objects", listing if written else lambda: _lists(store))
    if written:
        await attempt("conditional put", "put only if absent, atomically", store.claims_are_atomic)
        await attempt("delete", "delete objects", delete)
    return StoreReport(tuple(findings))


async def _tried(verb: str, words: str, call: Callable[[], Awaitable[bool]]) -> Finding:
    try:
        good = await call()
    except CubecacheError as error:
        if isinstance(error, Denied):
            return Finding(verb, False, f"no permission to {words}: {error.message}", error.remedy)
        return Finding(verb, False, f"cannot {words}: {error.message}", error.remedy)
    if good:
        return Finding(verb, True, words)
    if verb == "conditional put":
        return Finding(
            verb,
            False,
            "the store ignores conditions on a put: builders that meet rely on looks and leases",
            "nothing to do with one builder at a time",
        )
    return Finding(verb, False, f"cannot {words}: the answer was not what was written")


async def _absent(store: Store) -> Finding:
    """Without a scratch object, a clean 404 still shows that objects may be read."""
    try:
        with contextlib.suppress(NotFound):
            await store.get(f"{_PREFIX}/{secrets.token_hex(16)}", limit=1)
    except (Denied, Unavailable) as error:
        return Finding("get", False, f"cannot read objects: {error.message}", error.remedy)
    return Finding("get", True, "read objects")


async def _lists(store: Store) -> bool:
    async for _ in store.list(f"{_PREFIX}/"):
        break
    return True
