"""The wrapper that keeps a realm sealed: small objects and names are encrypted on their way.

Packs and boot packs are sealed by who makes them, chunk by chunk, because they are read in ranges.
Before the first call of a process the realm's record of secrets is compared with ours, so that a
wrong secret is said in words and is never taken for damage.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from imagecache.blockimage.jsonrecord import MAX_RECORD, decode_record, encode_record, match
from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.seals import (
    HEADER,
    MAX_KEY_ID,
    NO_KEY,
    NameSeals,
    Seals,
    sealed_with,
)
from imagecache.chunks import SEAL_BYTES
from imagecache.errors import Corrupt, Denied, NotFound, UsageError
from imagecache.store.base import ObjectStat, Store

OVERHEAD = HEADER.size + SEAL_BYTES
_CHECK = re.compile(r"[0-9a-f]{32}")
# What lies in the clear below the realm's prefix, names and bodies: markers and the store's clock
# say nothing of content; packs are sealed inside. gN/ stands for any generation.
_CLEAR = ("generations/", "packs/", "clock")
_CLEAR_INSIDE = ("bootpacks/",)
# Whose names are sealed behind these many segments. Other names are hashes of sealed bytes,
# numbers or holders.
_NAMED = {"aliases": 1, "pins": 1, "leases/builds": 2}
_GENERATION = re.compile(r"g\d{8}")


class SealedStore:
    """One realm of a store, sealed; keys of other prefixes pass as they are."""

    def __init__(self, inner: Store, keys: RealmKeys, seals: Seals) -> None:
        if seals.names is None:
            raise UsageError("a sealed store needs secrets")
        self._inner = inner
        self._keys = keys
        self._seals = seals
        self._names: NameSeals = seals.names
        self._lock = asyncio.Lock()
        self._compared = self._recorded = False
        self._known: set[int] = set()  # ids that the realm was ever sealed with

    async def get(self, key: str, *, limit: int) -> bytes:
        """As the inner store; Corrupt for what was changed, Denied without its secret."""
        if not self._is_sealed(key):
            return await self._inner.get(key, limit=limit)
        await self._ready()
        stored = await self._inner.get(self._outside(key), limit=limit + OVERHEAD)
        key_id = sealed_with(stored)
        if key_id not in self._seals.checks and not await self._is_known(key_id):
            raise Corrupt(f"{key} is not sealed with any secret of its realm")
        return await asyncio.to_thread(self._seals.open_object, key, stored)

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """As the inner store."""
        if not key.startswith(self._keys.prefix):
            return await self._inner.put(key, body, only_if_absent=only_if_absent)
        await self._ready(writing=True)
        if self._is_sealed(key):
            plain = body if isinstance(body, bytes) else await asyncio.to_thread(body.read_bytes)
            body = await asyncio.to_thread(self._seals.seal_object, key, plain)
        return await self._inner.put(self._outside(key), body, only_if_absent=only_if_absent)

    async def stat(self, key: str) -> ObjectStat:
        """As the inner store; the size is the stored one."""
        return replace(await self._inner.stat(self._outside(key)), key=key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """As the inner store; what carries no name of ours comes under the name that it has."""
        if prefix.startswith(self._keys.prefix):
            await self._ready()
        async for stat in self._inner.list(self._outside(prefix)):
            if stat.key != self._keys.sealed_realm:
                yield replace(stat, key=self._inside(stat.key))

    async def delete(self, key: str) -> None:
        """As the inner store."""
        if key.startswith(self._keys.prefix):
            await self._ready()
        await self._inner.delete(self._outside(key))

    async def claims_are_atomic(self) -> bool:
        """As the inner store."""
        return await self._inner.claims_are_atomic()

    async def close(self) -> None:
        """Closes the inner store."""
        await self._inner.close()

    async def key_id_of(self, key: str) -> int:
        """Under which secret an object's body is sealed; `NO_KEY` for one in the clear."""
        if not self._is_sealed(key):
            return NO_KEY
        return sealed_with(await self._inner.get(self._outside(key), limit=1 << 30))

    # --- names

    def _is_sealed(self, key: str) -> bool:
        if not key.startswith(self._keys.prefix):
            return False
        rest = key.removeprefix(self._keys.prefix)
        if rest.startswith(_CLEAR):
            return False
        first, _, inside = rest.partition("/")
        return not (_GENERATION.fullmatch(first) and inside.startswith(_CLEAR_INSIDE))

    def _head(self, key: str) -> int:
        """How many characters of a key or prefix are in the clear; all of them: len(key)."""
        at = len(self._keys.prefix)
        if not key.startswith(self._keys.prefix) or not self._is_sealed(key):
            return len(key)
        segments = key[at:].split("/")
        for name, count in _NAMED.items():
            if "/".join(segments[:count]) == name and len(segments) > count:
                return at + len(name) + 1
        if _GENERATION.fullmatch(segments[0]) and len(segments) > 2:
            return at + len(segments[0]) + len(segments[1]) + 2
        return len(key)

    def _outside(self, key: str) -> str:
        """A key, or a prefix that ends with a slash, as the inner store has it."""
        head = self._head(key)
        before, rest = key[:head], key[head:]
        sealed = before
        for name in rest.split("/"):
            sealed += (self._names.seal(before, name) if name else "") + "/"
            before += f"{name}/"
        return sealed[:-1]

    def _inside(self, key: str) -> str:
        head = self._head(key)
        before, rest = key[:head], key[head:]
        if not rest:
            return key
        names: list[str] = []
        for piece in rest.split("/"):
            if piece.startswith("t~") and names:
                names[-1] += f"/{piece}"
            else:
                names.append(piece)
        for name in names:
            before += (self._names.open(before, name) or name) + "/"
        return before[:-1]

    # --- the realm's record of secrets

    async def _ready(self, *, writing: bool = False) -> None:
        """Compares our secrets with the realm's record; the first write makes or extends it.

        Raises Denied for another secret, and for a realm that was begun in the clear.
        """
        if self._recorded or (self._compared and not writing):
            return
        async with self._lock:
            if self._recorded or (self._compared and not writing):
                return
            record = await self._record()
            if record is None:
                await self._require_empty()
                if not writing:
                    return
                record = _Record(self._names.check, dict(self._seals.checks))
                await self._inner.put(self._keys.sealed_realm, record.encode(), only_if_absent=True)
                record = await self._record() or record  # another one may have been first
            self._compare(record)
            self._compared = True
            self._known = set(record.checks)
            if not writing:
                return
            if set(self._seals.checks) - set(record.checks):
                record = _Record(record.names, {**record.checks, **self._seals.checks})
                await self._inner.put(self._keys.sealed_realm, record.encode())
            self._recorded = True

    async def _is_known(self, key_id: int) -> bool:
        """Whether the realm was ever sealed with a secret; looked up again, as others rotate it."""
        if key_id not in self._known and key_id != NO_KEY:
            record = await self._record()
            self._known = set(record.checks) if record is not None else set()
        return key_id in self._known

    async def _record(self) -> _Record | None:
        try:
            raw = await self._inner.get(self._keys.sealed_realm, limit=MAX_RECORD)
        except NotFound:
            return None
        return _Record.decode(raw)

    async def _require_empty(self) -> None:
        async for stat in self._inner.list(self._keys.generations):
            raise Denied(
                f"realm {self._keys.realm} was begun in the clear ({stat.key})",
                remedy="sealing is chosen at a realm's birth: use another realm, or no secrets",
            )

    def _compare(self, record: _Record) -> None:
        wrong = [
            f"secret {key_id}"
            for key_id, check in self._seals.checks.items()
            if record.checks.get(key_id, check) != check
        ]
        if record.names != self._names.check:
            wrong.insert(0, "the secret of names")
        if wrong:
            raise Denied(
                f"{' and '.join(wrong)} is not what realm {self._keys.realm} was sealed with",
                remedy="configure the secrets of this realm, or another realm",
            )


@dataclass(frozen=True, slots=True)
class _Record:
    """Checks of the secrets that a realm was ever sealed with, by key id."""

    names: str
    checks: Mapping[int, str]

    KIND = "sealed"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        checks = {str(key_id): check for key_id, check in sorted(self.checks.items())}
        return encode_record(self.KIND, {"names": self.names, "checks": checks})

    @classmethod
    def decode(cls, raw: bytes) -> _Record:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        checks = fields.get("checks")
        if not isinstance(checks, dict) or not all(
            key.isdecimal()
            and 0 < int(key) <= MAX_KEY_ID
            and isinstance(check, str)
            and _CHECK.fullmatch(check)
            for key, check in checks.items()
        ):
            raise Corrupt("a sealed record's checks are malformed")
        by_id = {int(key): str(check) for key, check in checks.items()}
        return cls(match(fields, "names", _CHECK), by_id)
