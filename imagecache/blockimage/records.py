"""The small JSON records: root (the commit), layer, alias, generation, start. Strictly parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from imagecache.blockimage.generations import State
from imagecache.blockimage.jsonrecord import (
    MAX_RECORD,
    decode_record,
    encode_record,
    match,
    number,
    text,
    texts,
)
from imagecache.errors import Corrupt

__all__ = [
    "MAX_RECORD",
    "AliasRecord",
    "GenerationRecord",
    "LayerRecord",
    "RootRecord",
    "StartRecord",
]

HEX64 = re.compile(r"[0-9a-f]{64}")
PACK_NAME = re.compile(r"[0-9a-f]{72}")  # generation and digest
_HEX64_OR_NOTHING = re.compile(r"(?:[0-9a-f]{64})?")
_FACE = re.compile(r"erofs|ext4")
OCI_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class RootRecord:
    """The commit of one image: everything it relies on in this store. Digests are hex."""

    realm: str
    generation: int
    image: str
    face: str
    options: str
    format_version: int
    platform: str
    config: str
    block_image: str
    locations: str
    layers: tuple[str, ...]  # diff ids, bottom first
    packs: tuple[str, ...]
    size_bytes: int
    chunks: int
    packed_bytes: int  # stored bytes of the image's chunks

    KIND = "root"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> RootRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(
            realm=text(fields, "realm"),
            generation=number(fields, "generation"),
            image=match(fields, "image", OCI_DIGEST),
            face=match(fields, "face", _FACE),
            options=text(fields, "options"),
            format_version=number(fields, "format_version"),
            platform=text(fields, "platform"),
            config=match(fields, "config", OCI_DIGEST),
            block_image=match(fields, "block_image", HEX64),
            locations=match(fields, "locations", HEX64),
            layers=texts(fields, "layers", OCI_DIGEST),
            packs=texts(fields, "packs", PACK_NAME),
            size_bytes=number(fields, "size_bytes"),
            chunks=number(fields, "chunks"),
            packed_bytes=number(fields, "packed_bytes"),
        )


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """Finds a converted layer by diff id: its index, and where its chunks are."""

    diff_id: str
    index: str
    locations: str
    packs: tuple[str, ...]  # that the location table names

    KIND = "layer"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> LayerRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(
            diff_id=match(fields, "diff_id", OCI_DIGEST),
            index=match(fields, "index", HEX64),
            locations=match(fields, "locations", HEX64),
            packs=texts(fields, "packs", PACK_NAME),
        )


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """A mutable name of an image: `name` is the reference's text, split at its tag."""

    repository: str
    tag: str
    name: str
    image: str

    KIND = "alias"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> AliasRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(
            repository=text(fields, "repository"),
            tag=text(fields, "tag"),
            name=text(fields, "name"),
            image=match(fields, "image", OCI_DIGEST),
        )


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """The marker of one state that a generation has reached; the last of its states holds."""

    number: int
    state: str

    KIND = "generation"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> GenerationRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        state = text(fields, "state")
        if state not in {known.word for known in State}:
            raise Corrupt(f"a generation record has state {state!r}")
        return cls(number=number(fields, "number"), state=state)


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What is known of one image's start: its profile, and the boot pack made from it.

    Digests are hex; `boot_table` is empty where no boot pack was built. `block_image` says for
    which face and cut of the image the boot pack was made.
    """

    repository: str
    image: str
    block_image: str
    profile: str
    boot_table: str
    sources: int

    KIND = "start"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return encode_record(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> StartRecord:
        """Raises Corrupt or Unsupported."""
        fields = decode_record(cls.KIND, raw)
        return cls(
            repository=text(fields, "repository"),
            image=match(fields, "image", OCI_DIGEST),
            block_image=match(fields, "block_image", HEX64),
            profile=match(fields, "profile", HEX64),
            boot_table=match(fields, "boot_table", _HEX64_OR_NOTHING),
            sources=number(fields, "sources"),
        )
