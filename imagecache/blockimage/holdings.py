"""Records of who relies on what, and of what collection is about to delete. Strictly parsed.

Their age is the store's `modified` of the object, never a time inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from imagecache.blockimage.jsonrecord import (
    decode_record,
    encode_record,
    match,
    number,
    text,
    texts,
)
from imagecache.blockimage.records import OCI_DIGEST, PACK_NAME
from imagecache.errors import Corrupt

PURPOSES = ("build", "read", "collect")


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A holder's right for `ttl_seconds` after the object was last written.

    A builder's names the generation that it writes into, a reader's the images and packs that its
    exports read, the collector's a token that rises with every holder.
    """

    purpose: str
    holder: str
    ttl_seconds: int
    generation: int = 0
    token: int = 0
    images: tuple[str, ...] = ()
    packs: tuple[str, ...] = ()

    KIND = "lease"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> LeaseRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        purpose = text(fields, "purpose")
        if purpose not in PURPOSES:
            raise Corrupt(f"a lease record has purpose {purpose!r}")
        return cls(
            purpose=purpose,
            holder=text(fields, "holder"),
            ttl_seconds=number(fields, "ttl_seconds"),
            generation=number(fields, "generation"),
            token=number(fields, "token"),
            images=texts(fields, "images", OCI_DIGEST),
            packs=texts(fields, "packs", PACK_NAME),
        )


@dataclass(frozen=True, slots=True)
class PinRecord:
    """Somebody's word that an image stays for `ttl_seconds` after the object was last written."""

    image: str
    name: str
    ttl_seconds: int

    KIND = "pin"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> PinRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(
            image=match(fields, "image", OCI_DIGEST),
            name=text(fields, "name"),
            ttl_seconds=number(fields, "ttl_seconds"),
        )


@dataclass(frozen=True, slots=True)
class TombstoneRecord:
    """Packs that nothing readable named when generation `newest` was the newest."""

    newest: int
    packs: tuple[str, ...]

    KIND = "tombstones"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> TombstoneRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(newest=number(fields, "newest"), packs=texts(fields, "packs", PACK_NAME))


@dataclass(frozen=True, slots=True)
class LeftRecord:
    """Packs that count as named in a generation although its records name others by now."""

    packs: tuple[str, ...]

    KIND = "left"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {"packs": self.packs})

    @classmethod
    def decode(cls, raw: bytes) -> LeftRecord:
        """Raises Corrupt or Unsupported."""
        return cls(packs=texts(decode_record(cls.KIND, raw), "packs", PACK_NAME))
