"""OCI content descriptors, and the typed look-ups that manifest parsing is made of."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from imagecache.errors import LimitExceeded, Rejected
from imagecache.oci.digest import Digest
from imagecache.oci.platform import Platform
from imagecache.oci.strictjson import Json

_MEDIA_TYPE = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}\Z"
)
_MAX_SIZE = 2**63 - 1
_MAX_URLS = 16
_MAX_ANNOTATIONS = 1024


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What names a blob: media type, digest and size in bytes, with the optional extras.

    `inline` is the content itself where the descriptor embeds it (verified when parsed).
    """

    media_type: str
    digest: Digest
    size: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    platform: Platform | None = None
    inline: bytes | None = field(default=None, repr=False)

    def verify(self, body: bytes, what: str) -> bytes:
        """Return `body` if it has this descriptor's size and digest; raises `Rejected`."""
        if len(body) != self.size:
            raise Rejected(f"{what} has {len(body)} bytes, its descriptor says {self.size}")
        hasher = self.digest.hasher()
        hasher.update(body)
        if not self.digest.matches(hasher):
            raise Rejected(f"{what} does not match its digest {self.digest}")
        return body


def parse_descriptor(node: Json, what: str, *, max_size: int = _MAX_SIZE) -> Descriptor:
    """Parse one descriptor object; raises `Rejected`, or `LimitExceeded` over `max_size`."""
    members = as_object(node, what)
    size = members.get("size")
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise Rejected(f"{what} has no size that is a whole number of bytes")
    if size > max_size:
        raise LimitExceeded(f"{what} has {size} bytes, the limit is {max_size}")
    urls = strings(members.get("urls"), f"{what}: urls", limit=_MAX_URLS)
    descriptor = Descriptor(
        media_type=media_type(members.get("mediaType"), what),
        digest=Digest.parse(members.get("digest")),
        size=size,
        urls=urls,
        annotations=string_map(members.get("annotations"), f"{what}: annotations"),
        platform=parse_platform_object(members.get("platform"), what),
    )
    embedded = members.get("data")
    if embedded is None:
        return descriptor
    return _with_inline(descriptor, embedded, what)


def _with_inline(descriptor: Descriptor, embedded: Json, what: str) -> Descriptor:
    if not isinstance(embedded, str):
        raise Rejected(f"{what}: data is not a string")
    try:
        body = base64.b64decode(embedded, validate=True)
    except (binascii.Error, ValueError):
        raise Rejected(f"{what}: data is not base64") from None
    descriptor.verify(body, f"{what}: data")
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        descriptor.urls,
        descriptor.annotations,
        descriptor.platform,
        body,
    )


def parse_platform_object(node: Json, what: str) -> Platform | None:
    """A descriptor's platform; None where there is none."""
    if node is None:
        return None
    members = as_object(node, f"{what}: platform")
    return Platform(
        text(members.get("os"), f"{what}: platform.os") or "",
        text(members.get("architecture"), f"{what}: platform.architecture") or "",
        text(members.get("variant"), f"{what}: platform.variant") or None,
    )


def media_type(node: Json, what: str) -> str:
    """A media type of RFC 6838's form, without parameters."""
    if not isinstance(node, str) or not _MEDIA_TYPE.match(node):
        raise Rejected(f"{what} has no well-formed mediaType")
    return node


def as_object(node: Json, what: str) -> dict[str, Json]:
    """`node` as an object."""
    if not isinstance(node, dict):
        raise Rejected(f"{what} is not an object")
    return node


def as_list(node: Json, what: str, *, limit: int) -> list[Json]:
    """`node` as an array of at most `limit` members."""
    if not isinstance(node, list):
        raise Rejected(f"{what} is not an array")
    if len(node) > limit:
        raise LimitExceeded(f"{what} has {len(node)} entries, the limit is {limit}")
    return node


def text(node: Json, what: str) -> str | None:
    """`node` as a string without NUL, or None where it is absent or null."""
    if node is None:
        return None
    if not isinstance(node, str):
        raise Rejected(f"{what} is not a string")
    if "\x00" in node:
        raise Rejected(f"{what} has a NUL character")
    return node


def strings(node: Json, what: str, *, limit: int) -> tuple[str, ...]:
    """`node` as a tuple of strings without NUL; absent and null are empty."""
    if node is None:
        return ()
    found = []
    for member in as_list(node, what, limit=limit):
        checked = text(member, what)
        if checked is None:
            raise Rejected(f"{what} has a null entry")
        found.append(checked)
    return tuple(found)


def string_map(node: Json, what: str) -> Mapping[str, str]:
    """`node` as a map from strings to strings; absent and null are empty."""
    if node is None:
        return {}
    members = as_object(node, what)
    if len(members) > _MAX_ANNOTATIONS:
        raise LimitExceeded(f"{what} has more than {_MAX_ANNOTATIONS} entries")
    checked: dict[str, str] = {}
    for key, member in members.items():
        if not isinstance(member, str):
            raise Rejected(f"{what} has a value that is not a string")
        checked[key] = member
    return checked
