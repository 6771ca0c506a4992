"""The small JSON records: root (the commit), layer, alias, generation. Strictly parsed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from imagecache.errors import Corrupt, Unsupported

MAX_RECORD = 4 << 20
_HEX64 = re.compile(r"[0-9a-f]{64}")
_PACK_NAME = re.compile(r"[0-9a-f]{72}")  # generation and digest
_HEX64_OR_NOTHING = re.compile(r"(?:[0-9a-f]{64})?")
_OCI_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


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
        return _encode(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> RootRecord:
        """Raises Corrupt or Unsupported."""
        fields = _decode(cls.KIND, raw)
        return cls(
            realm=_text(fields, "realm"),
            generation=_number(fields, "generation"),
            image=_match(fields, "image", _OCI_DIGEST),
            face=_text(fields, "face"),
            options=_text(fields, "options"),
            format_version=_number(fields, "format_version"),
            platform=_text(fields, "platform"),
            config=_match(fields, "config", _OCI_DIGEST),
            block_image=_match(fields, "block_image", _HEX64),
            locations=_match(fields, "locations", _HEX64),
            layers=_texts(fields, "layers", _OCI_DIGEST),
            packs=_texts(fields, "packs", _PACK_NAME),
            size_bytes=_number(fields, "size_bytes"),
            chunks=_number(fields, "chunks"),
            packed_bytes=_number(fields, "packed_bytes"),
        )


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """Finds a converted layer by diff id: its index, and where its chunks are."""

    diff_id: str
    index: str
    locations: str

    KIND = "layer"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return _encode(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> LayerRecord:
        """Raises Corrupt or Unsupported."""
        fields = _decode(cls.KIND, raw)
        return cls(
            diff_id=_match(fields, "diff_id", _OCI_DIGEST),
            index=_match(fields, "index", _HEX64),
            locations=_match(fields, "locations", _HEX64),
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
        return _encode(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> AliasRecord:
        """Raises Corrupt or Unsupported."""
        fields = _decode(cls.KIND, raw)
        return cls(
            repository=_text(fields, "repository"),
            tag=_text(fields, "tag"),
            name=_text(fields, "name"),
            image=_match(fields, "image", _OCI_DIGEST),
        )


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """The state of a generation: active, retired, expired or deleted; it only moves forward."""

    number: int
    state: str

    KIND = "generation"

    def encode(self) -> bytes:
        """The record's JSON bytes."""
        return _encode(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> GenerationRecord:
        """Raises Corrupt or Unsupported."""
        fields = _decode(cls.KIND, raw)
        state = _text(fields, "state")
        if state not in ("active", "retired", "expired", "deleted"):
            raise Corrupt(f"a generation record has state {state!r}")
        return cls(number=_number(fields, "number"), state=state)


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
        return _encode(self.KIND, {name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, raw: bytes) -> StartRecord:
        """Raises Corrupt or Unsupported."""
        fields = _decode(cls.KIND, raw)
        return cls(
            repository=_text(fields, "repository"),
            image=_match(fields, "image", _OCI_DIGEST),
            block_image=_match(fields, "block_image", _HEX64),
            profile=_match(fields, "profile", _HEX64),
            boot_table=_match(fields, "boot_table", _HEX64_OR_NOTHING),
            sources=_number(fields, "sources"),
        )


def _encode(kind: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, "version": 1, **fields}, sort_keys=True).encode() + b"\n"


def _decode(kind: str, raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_RECORD:
        raise Corrupt(f"a {kind} record of {len(raw)} bytes is over the format's cap")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"a {kind} record is not JSON") from error
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise Corrupt(f"not a {kind} record")
    if fields.get("version") != 1:
        raise Unsupported(
            f"a {kind} record of version {fields.get('version')}", remedy="needs a newer cubecache"
        )
    return fields


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise Corrupt(f"a {fields['kind']} record's {name} is not a text")
    return value


def _match(fields: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = _text(fields, name)
    if not pattern.fullmatch(value):
        raise Corrupt(f"a {fields['kind']} record's {name} is malformed")
    return value


def _texts(fields: dict[str, Any], name: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise Corrupt(f"a {fields['kind']} record's {name} is not a list")
    if not all(isinstance(value, str) and pattern.fullmatch(value) for value in values):
        raise Corrupt(f"a {fields['kind']} record's {name} is malformed")
    return tuple(values)


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise Corrupt(f"a {fields['kind']} record's {name} is not a size")
    return value
