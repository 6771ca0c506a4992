"""Every key of the store, in one place. The realm is in each of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from blake3 import blake3

from imagecache.blockimage.generations import SEALED, State
from imagecache.blockimage.locations import split_pack_name
from imagecache.blockimage.manifest import Face
from imagecache.errors import UsageError

FORMAT_VERSION = 1
"""Raised whenever the same image would get other digests."""

SealedKind = Literal["indexes", "manifests", "locations"]

_REALM = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:@-")
_MAX_SEGMENT = 180


@dataclass(frozen=True, slots=True)
class ImageKey:
    """What a block image is built from and how: the identity under which a root is found."""

    image: str  # manifest digest, `sha256:...`
    face: Face
    options: str  # canonical JSON
    format_version: int = FORMAT_VERSION

    def digest(self) -> str:
        """64 hex digits that name this key's roots."""
        text = json.dumps([self.image, int(self.face), self.options, self.format_version])
        return blake3(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RealmKeys:
    """The keys of one realm.

    No key is ever written again once its generation has expired, so that a collector which was
    frozen for an hour can delete late without harm.
    """

    realm: str

    def __post_init__(self) -> None:
        if not _REALM.fullmatch(self.realm):
            raise UsageError(
                f"realm {self.realm!r} is not a realm's name",
                remedy="use 1-63 lower-case letters, digits, dots, dashes and underscores",
            )

    @property
    def prefix(self) -> str:
        """What every key of the realm begins with."""
        return f"v1/{self.realm}/"

    @property
    def all_packs(self) -> str:
        """The prefix of the packs of all generations."""
        return f"{self.prefix}packs/"

    def generation(self, number: int, state: State) -> str:
        """The marker that a generation has reached a state."""
        return f"{self.generations}{number:08d}.{state.word}.json"

    @property
    def generations(self) -> str:
        """The prefix of the states of all generations."""
        return f"{self.prefix}generations/"

    @property
    def sealed_realm(self) -> str:
        """Which secrets the realm is sealed with, by their checks; only a sealed realm has it."""
        return f"{self.generations}{SEALED}"

    @property
    def clock(self) -> str:
        """An object that is written to learn the store's time."""
        return f"{self.prefix}clock"

    def build_lease(self, key: ImageKey) -> str:
        """Who builds one image; mutable."""
        return f"{self.build_leases}{key.digest()}.json"

    @property
    def build_leases(self) -> str:
        """The prefix of all builders' leases."""
        return f"{self.prefix}leases/builds/"

    def reader_lease(self, holder: str) -> str:
        """What one daemon reads; mutable."""
        return f"{self.reader_leases}{holder}.json"

    @property
    def reader_leases(self) -> str:
        """The prefix of all readers' leases."""
        return f"{self.prefix}leases/readers/"

    @property
    def collector_lease(self) -> str:
        """Who collects; mutable."""
        return f"{self.prefix}leases/collector.json"

    def pin(self, image: str) -> str:
        """A pin of one image; mutable."""
        return f"{self.pins}{image.replace(':', '-')}.json"

    @property
    def pins(self) -> str:
        """The prefix of all pins."""
        return f"{self.prefix}pins/"

    @property
    def collections(self) -> str:
        """The prefix of the tombstones that collections leave for later ones."""
        return f"{self.prefix}collections/"

    def quarantined(self, pack: bytes) -> str:
        """The marker of a pack found damaged; it names the chunks that are."""
        generation, digest = split_pack_name(pack)
        return f"{self.quarantine}{generation:08d}-{digest.hex()}.json"

    @property
    def quarantine(self) -> str:
        """The prefix of the markers of damaged packs."""
        return f"{self.prefix}quarantine/"

    @property
    def scrub_position(self) -> str:
        """How far the scrub of the realm is; mutable."""
        return f"{self.prefix}scrub.json"

    def within(self, generation: int) -> str:
        """The prefix of everything of one generation but its packs."""
        return f"{self.prefix}g{generation:08d}/"

    def root(self, key: ImageKey, generation: int) -> str:
        """The root record of one image in one generation: the commit."""
        return f"{self.roots(generation)}{key.digest()}.json"

    def roots(self, generation: int) -> str:
        """The prefix of all roots of a generation."""
        return f"{self.within(generation)}roots/"

    def layer(self, diff_id: str, generation: int) -> str:
        """The record that finds a converted layer by its diff id."""
        name = f"{diff_id.replace(':', '-')}.f{FORMAT_VERSION}.json"
        return f"{self.layers(generation)}{name}"

    def layers(self, generation: int) -> str:
        """The prefix of all layer records of a generation."""
        return f"{self.within(generation)}layers/"

    def left(self, digest: bytes, generation: int) -> str:
        """Packs that records of a generation named, and that re-packing took out of them."""
        return f"{self.all_left(generation)}{digest.hex()}.json"

    def all_left(self, generation: int) -> str:
        """The prefix of the packs that re-packing left behind in a generation."""
        return f"{self.within(generation)}left/"

    def sealed(self, kind: SealedKind, digest: bytes, generation: int) -> str:
        """A sealed layer index, block manifest or location table."""
        return f"{self.within(generation)}{kind}/{digest.hex()}"

    def blob(self, digest: str, generation: int) -> str:
        """An OCI manifest or config, as the registry had it."""
        return f"{self.within(generation)}blobs/{digest.replace(':', '-')}"

    def pack(self, name: bytes) -> str:
        """A pack, by its name: the generation that it was written in, and its digest."""
        generation, digest = split_pack_name(name)
        return f"{self.packs(generation)}{digest.hex()}"

    def packs(self, generation: int) -> str:
        """The prefix of the packs that were written in a generation."""
        return f"{self.prefix}packs/{generation:08d}/"

    def profile(self, digest: bytes, generation: int) -> str:
        """A sealed profile."""
        return f"{self.within(generation)}profiles/{digest.hex()}"

    def boot_table(self, digest: bytes, generation: int) -> str:
        """A sealed boot table: what a boot pack holds, in order."""
        return f"{self.within(generation)}boottables/{digest.hex()}"

    def boot_pack(self, name: bytes, generation: int) -> str:
        """A boot pack: a pack that holds copies of chunks in the order of a start."""
        return f"{self.within(generation)}bootpacks/{name.hex()}"

    def start(self, repository: str, image: str, generation: int) -> str:
        """The mutable record of what is known of one image's start."""
        return f"{self.starts_of(repository, generation)}{image.replace(':', '-')}.json"

    def starts_of(self, repository: str, generation: int) -> str:
        """The prefix of the start records of one repository's images."""
        return f"{self.within(generation)}starts/{_segment(repository)}/"

    def alias(self, repository: str, tag: str) -> str:
        """A mutable name; repository and tag are each escaped into one key segment."""
        return f"{self.aliases_of(repository)}{_segment(tag)}.json"

    def aliases_of(self, repository: str) -> str:
        """The prefix of one repository's aliases."""
        return f"{self.aliases}{_segment(repository)}/"

    @property
    def aliases(self) -> str:
        """The prefix of all aliases."""
        return f"{self.prefix}aliases/"


def _segment(text: str) -> str:
    """One key segment for any text: bytes outside the key grammar as `=XX`, long ones by digest."""
    escaped = "".join(
        chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in text.encode(errors="replace")
    )
    if len(escaped) > _MAX_SEGMENT:
        escaped = escaped[:100] + "~" + blake3(text.encode(errors="replace")).hexdigest()[:32]
    return f"n.{escaped}"
