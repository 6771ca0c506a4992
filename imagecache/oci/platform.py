"""Platforms (`linux/arm64/v8`) and which entries of an index serve which platform.

Source: OCI image index specification, platform variants; names are Go's GOOS and GOARCH.
"""

from __future__ import annotations

import platform as host
import re
from dataclasses import dataclass

from imagecache.errors import Unsupported, UsageError

_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")

_MACHINES: dict[str, tuple[str, str | None]] = {
    "x86_64": ("amd64", None),
    "amd64": ("amd64", None),
    "aarch64": ("arm64", None),
    "arm64": ("arm64", None),
    "armv8l": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", None),
    "i686": ("386", None),
    "ppc64le": ("ppc64le", None),
    "s390x": ("s390x", None),
    "riscv64": ("riscv64", None),
    "loongarch64": ("loong64", None),
}
_ARCHITECTURE_NAMES = {"x86_64": "amd64", "aarch64": "arm64", "armhf": "arm", "i386": "386"}
# What a missing variant means.
_DEFAULT_VARIANT = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
_NUMBERED = re.compile(r"v([0-9]{1,2})(?:\.([0-9]{1,2}))?\Z")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system, an architecture, and the variant (None: the architecture's usual)."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        parts = (self.os, self.architecture, *((self.variant,) if self.variant else ()))
        return "/".join(parts)


def parse_platform(text: str) -> Platform:
    """Parse `OS/ARCH[/VARIANT]`; raises `UsageError`."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(_PART.match(part) for part in parts):
        raise UsageError(
            f"not a platform: {text[:80]!a}", remedy="write OS/ARCH[/VARIANT]: linux/arm64"
        )
    architecture = _ARCHITECTURE_NAMES.get(parts[1], parts[1])
    return Platform(parts[0], architecture, parts[2] if len(parts) == 3 else None)


def host_platform(machine: str | None = None) -> Platform:
    """This host's platform, or that of the `uname -m` name given; raises `Unsupported`."""
    name = machine if machine is not None else host.machine()
    known = _MACHINES.get(name)
    if known is None:
        raise Unsupported(
            f"unknown machine type {name!a}", remedy="name the platform: --platform OS/ARCH"
        )
    return Platform("linux", *known)


def fitness(wanted: Platform, offered: Platform) -> int | None:
    """How well `offered` runs on `wanted`: None is not at all, a higher number is better.

    On arm, arm64 and amd64 an image for a lower variant of the same architecture runs too;
    the highest that runs is the best. Elsewhere variants must be equal, or not be given.
    """
    if (wanted.os, wanted.architecture) != (offered.os, offered.architecture):
        return None
    want = _level(wanted)
    offer = _level(offered)
    if want is None or offer is None:
        if wanted.variant == offered.variant:
            return 1
        return 0 if offered.variant is None or wanted.variant is None else None
    return offer if offer <= want else None


def _level(platform: Platform) -> int | None:
    usual = _DEFAULT_VARIANT.get(platform.architecture)
    if usual is None:
        return None
    match = _NUMBERED.match(platform.variant or usual)
    return int(match[1]) * 100 + int(match[2] or 0) if match else None
