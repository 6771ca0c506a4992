"""Sealing: encryption of what a realm stores, with secrets that the bucket never sees. Pure.

Everything derives from a `Secrets` document: a secret per key id, of which the first seals what is
new, and one for names that never changes. BLAKE3 in keyed mode derives keys and synthetic nonces,
AES-256-GCM encrypts. A nonce is a keyed hash of exactly the bytes that are encrypted, and every
chunk and object has a key of its own: so the same bytes give the same ciphertext (convergent inside
the realm, a pack comes out as it was), and two encodings of one chunk never share a nonce.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from imagecache.chunks import SEAL_BYTES
from imagecache.errors import Corrupt, Denied, UsageError

MAGIC = b"CCCRYPT1"
HEADER = struct.Struct("<8sBBHI")  # magic, key id, reserved, reserved, reserved
NONCE_BYTES, TAG_BYTES = 12, 16
SECRET_BYTES = 32
MAX_KEY_ID = 255
NO_KEY = 0
"""The key id of what is stored in the clear."""

MAX_DOCUMENT = 64 << 10
_WORD = re.compile(r"(names|[1-9][0-9]{0,2}):([0-9a-f]{64})")
_NAME_MARK, _MORE_MARK = "s~", "t~"
_NAME_PIECE = 190
_SIV_BYTES = 16


def _derive(context: str, secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=f"cubecache 2026 {context}").digest()


def _encrypt(key: bytes, nonce_key: bytes, plaintext: bytes, bound_to: bytes) -> bytes:
    """Nonce, ciphertext, tag; the nonce is a keyed hash of what is encrypted and its key."""
    hasher = blake3(key=nonce_key)
    hasher.update(key)
    hasher.update(plaintext)
    nonce = hasher.digest(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, bound_to)


def _decrypt(key: bytes, sealed: bytes | memoryview, bound_to: bytes) -> bytes | None:
    if len(sealed) < SEAL_BYTES:
        return None
    try:
        nonce, body = bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:]
        return AESGCM(key).decrypt(nonce, body, bound_to)
    except InvalidTag:
        return None


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """A realm's secrets: by key id, and the one for names. `active` seals what is new."""

    names: bytes
    by_id: Mapping[int, bytes]
    active: int

    @classmethod
    def parse(cls, document: str) -> Secrets:
        """`names:HEX`, then `ID:HEX` once or more, 64 hex digits each, the active one first.

        Words are parted by white space; a line that starts with # is a remark. UsageError never
        repeats what was given.
        """
        lines = document[:MAX_DOCUMENT].splitlines()
        words = [
            word for line in lines if not line.lstrip().startswith("#") for word in line.split()
        ]
        names: bytes | None = None
        by_id: dict[int, bytes] = {}
        for number, word in enumerate(words, 1):
            parts = _WORD.fullmatch(word)
            if parts is None:
                raise _malformed(f"word {number} is not ID:HEX with 64 hex digits")
            secret = bytes.fromhex(parts[2])
            if parts[1] == "names":
                if names is not None:
                    raise _malformed("names stands there twice")
                names = secret
            elif int(parts[1]) > MAX_KEY_ID or int(parts[1]) in by_id:
                raise _malformed(f"key id {parts[1]} is over {MAX_KEY_ID}, or there twice")
            else:
                by_id[int(parts[1])] = secret
        if names is None or not by_id:
            raise _malformed("it needs names:HEX and at least one ID:HEX")
        if len({names, *by_id.values()}) <= len(by_id):
            raise _malformed("two of its secrets are the same")
        return cls(names, by_id, next(iter(by_id)))

    def text(self) -> str:
        """The document that `parse` reads."""
        words = [f"names:{self.names.hex()}"]
        words += [f"{key_id}:{secret.hex()}" for key_id, secret in self.by_id.items()]
        return "\n".join(words) + "\n"

    def with_new(self, secret: bytes, *, active: bool) -> Secrets:
        """These and one more, under the next id; UsageError where ids have run out."""
        key_id = max(self.by_id) + 1
        if key_id > MAX_KEY_ID or len(secret) != SECRET_BYTES:
            raise UsageError(f"key id {key_id} is over {MAX_KEY_ID}", remedy="begin a new realm")
        new, old = {key_id: secret}, dict(self.by_id)
        ordered = new | old if active else old | new
        return Secrets(self.names, ordered, next(iter(ordered)))

    def using(self, key_id: int) -> Secrets:
        """These, with another one active."""
        if key_id not in self.by_id:
            raise UsageError(f"there is no secret {key_id}")
        return Secrets(self.names, {key_id: self.by_id[key_id]} | dict(self.by_id), key_id)


def _malformed(why: str) -> UsageError:
    return UsageError(
        f"the realm's secrets are malformed: {why}", remedy="cubecache secrets new FILE"
    )


@dataclass(frozen=True, slots=True, repr=False)
class PackKey:
    """What it takes to seal new packs, and nothing else: a worker process is given this alone."""

    key_id: int
    chunks: bytes
    tables: bytes
    nonces: bytes

    def seal_chunk(self, digest: bytes, stored: bytes) -> bytes:
        """An encoded chunk under the key of its digest."""
        return _encrypt(blake3(digest, key=self.chunks).digest(), self.nonces, stored, b"")

    def open_chunk(self, digest: bytes, sealed: bytes | memoryview) -> bytes | None:
        """The encoded chunk, or None where it was changed or is another chunk's."""
        return _decrypt(blake3(digest, key=self.chunks).digest(), sealed, b"")

    def seal_table(self, table: bytes) -> bytes:
        """A pack's table."""
        return _encrypt(self.tables, self.nonces, table, b"")

    def open_table(self, sealed: bytes) -> bytes | None:
        """A pack's table, or None where it was changed."""
        return _decrypt(self.tables, sealed, b"")

    def as_json(self) -> dict[str, object]:
        """For the worker's job, over its stdin."""
        keys = {name: getattr(self, name).hex() for name in ("chunks", "tables", "nonces")}
        return {"key_id": self.key_id, **keys}

    @classmethod
    def from_json(cls, fields: Mapping[str, object]) -> PackKey:
        """The inverse."""
        chunks, tables, nonces = (
            bytes.fromhex(str(fields[name])) for name in ("chunks", "tables", "nonces")
        )
        return cls(int(str(fields["key_id"])), chunks, tables, nonces)


class Seals:
    """The keys of one realm, ready for use. Without secrets it opens what is in the clear alone."""

    def __init__(self, secrets: Secrets | None = None) -> None:
        self._packs: dict[int, PackKey] = {}
        self._objects: dict[int, bytes] = {}
        self._checks: dict[int, str] = {}
        self.names: NameSeals | None = None
        self.active = NO_KEY
        if secrets is None:
            return
        self.active = secrets.active
        self.names = NameSeals(secrets.names)
        for key_id, secret in secrets.by_id.items():
            self._packs[key_id] = PackKey(
                key_id,
                _derive("chunks", secret),
                _derive("pack tables", secret),
                _derive("nonces", secret),
            )
            self._objects[key_id] = _derive("objects", secret)
            self._checks[key_id] = _derive("check", secret).hex()[:32]

    @property
    def checks(self) -> Mapping[int, str]:
        """By key id, what tells one secret from another and says nothing else of it."""
        return self._checks

    @property
    def pack_key(self) -> PackKey | None:
        """What seals new packs; None where packs are written in the clear."""
        return self._packs.get(self.active)

    def open_chunk(
        self, key_id: int, digest: bytes, stored: bytes | memoryview
    ) -> bytes | memoryview:
        """The encoded chunk behind stored bytes.

        Raises Corrupt where they were changed or are another chunk's, Denied without the secret.
        """
        if key_id == NO_KEY:
            return stored
        opened = self._pack(key_id, f"chunk {digest.hex()}").open_chunk(digest, stored)
        if opened is None:
            raise Corrupt(f"chunk {digest.hex()} was changed: its seal (key {key_id}) is broken")
        return opened

    def open_table(self, key_id: int, sealed: bytes) -> bytes:
        """A pack's table; Corrupt or Denied as `open_chunk`."""
        if key_id == NO_KEY:
            return sealed
        opened = self._pack(key_id, "a pack's table").open_table(sealed)
        if opened is None:
            raise Corrupt(f"a pack's table was changed: its seal (key {key_id}) is broken")
        return opened

    def seal_object(self, key: str, body: bytes) -> bytes:
        """An object as it is stored under a key; it opens under that key alone."""
        bound_to = key.encode()
        own = blake3(bound_to, key=self._objects[self.active]).digest()
        nonces = self._packs[self.active].nonces
        return HEADER.pack(MAGIC, self.active, 0, 0, 0) + _encrypt(own, nonces, body, bound_to)

    def open_object(self, key: str, stored: bytes) -> bytes:
        """The inverse. Raises Corrupt, or Denied where its secret is not configured."""
        if len(stored) < HEADER.size + SEAL_BYTES:
            raise Corrupt(f"{key} is truncated")
        magic, key_id, *reserved = HEADER.unpack_from(stored)
        if magic != MAGIC or any(reserved):
            raise Corrupt(f"{key} is no sealed object")
        secret = self._objects.get(key_id)
        if secret is None:
            raise _missing(key_id, key)
        bound_to = key.encode()
        own = blake3(bound_to, key=secret).digest()
        opened = _decrypt(own, memoryview(stored)[HEADER.size :], bound_to)
        if opened is None:
            raise Corrupt(f"{key} was changed, or lay elsewhere: its seal (key {key_id}) is broken")
        return opened

    def _pack(self, key_id: int, what: str) -> PackKey:
        found = self._packs.get(key_id)
        if found is None:
            raise _missing(key_id, what)
        return found


def _missing(key_id: int, what: str) -> Denied:
    return Denied(
        f"{what} is sealed with secret {key_id}, which is not configured",
        remedy="add that secret to what [encryption] secrets names",
    )


def sealed_with(stored: bytes) -> int:
    """The key id in the first bytes of a stored object; `NO_KEY` for one in the clear."""
    if len(stored) < HEADER.size or not stored.startswith(MAGIC):
        return NO_KEY
    return int(HEADER.unpack_from(stored)[1])


NO_SEALS: Final = Seals()


class NameSeals:
    """Names of objects, one segment of a key at a time: deterministic, and read back by us alone.

    A sealed name is `s~` and base64url of a 16-byte keyed hash of (what stands before it, name) and
    the name under a key stream of that hash; what is too long goes on in segments `t~...`.
    """

    def __init__(self, secret: bytes) -> None:
        self._hash = _derive("name hashes", secret)
        self._stream = _derive("name streams", secret)
        self.check = _derive("check", secret).hex()[:32]

    def seal(self, before: str, name: str) -> str:
        """One segment as one or more; one that is sealed already stays as it is."""
        if name.startswith(_NAME_MARK):
            return name
        plain = name.encode()
        siv = self._siv(before, plain)
        token = base64.urlsafe_b64encode(siv + self._mixed(siv, plain)).decode().rstrip("=")
        pieces = [token[at : at + _NAME_PIECE] for at in range(0, len(token), _NAME_PIECE)]
        return f"/{_MORE_MARK}".join([_NAME_MARK + pieces[0], *pieces[1:]])

    def open(self, before: str, sealed: str) -> str | None:
        """The name behind what `seal` made; None for what it did not make."""
        head, *more = sealed.split("/")
        if not head.startswith(_NAME_MARK) or not all(x.startswith(_MORE_MARK) for x in more):
            return None
        token = "".join(piece[2:] for piece in (head, *more))
        try:
            raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            name = self._mixed(raw[:_SIV_BYTES], raw[_SIV_BYTES:]).decode()
        except (ValueError, binascii.Error):
            return None
        return name if self.seal(before, name) == sealed else None

    def _siv(self, before: str, plain: bytes) -> bytes:
        hasher = blake3(key=self._hash)
        hasher.update(before.encode() + b"\0")
        hasher.update(plain)
        return hasher.digest(_SIV_BYTES)

    def _mixed(self, siv: bytes, text: bytes) -> bytes:
        stream = blake3(siv, key=self._stream).digest(len(text))
        return bytes(a ^ b for a, b in zip(text, stream, strict=True))
