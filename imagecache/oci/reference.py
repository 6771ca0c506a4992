"""Image references: registry names, OCI layout directories and docker archives.

Source of the grammar: the OCI distribution specification (repository names and tags) and
docker's rules for short names. Stricter than docker in one place: the part before the first
slash is a host only if it has a dot or a port or is `localhost`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from imagecache.errors import Rejected, UsageError
from imagecache.oci.digest import Digest

_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(
    rf"(?P<name>{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:]+\])(?::(?P<port>[0-9]{{1,5}}))?\Z"
)
_HEX_ID = re.compile(r"[0-9a-f]{64}\Z")
_MAX_NAME = 255
_MAX_TEXT = 4096 + 512

DOCKER_HUB = "docker.io"


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """`host/repository` with a tag, a digest, or both (then the digest alone decides)."""

    host: str  # lower case, with the port if one was given
    repository: str
    tag: str | None
    digest: Digest | None

    @property
    def canonical(self) -> str:
        """The full name: `host/repo@digest` where a digest is given, else `host/repo:tag`."""
        if self.digest is not None:
            return f"{self.host}/{self.repository}@{self.digest}"
        return f"{self.host}/{self.repository}:{self.tag}"

    @property
    def selector(self) -> str:
        """What stands in a manifest's URL: the digest, else the tag."""
        return str(self.digest) if self.digest is not None else str(self.tag)


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An OCI image layout directory, and the `ref.name` of one image in it (None: the only one)."""

    path: Path
    tag: str | None

    @property
    def canonical(self) -> str:
        """`oci:DIR[:TAG]`."""
        return f"oci:{self.path}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True, slots=True)
class ArchiveReference:
    """A file of `docker save`, and the name of one image in it (None: the only one)."""

    path: Path
    tag: str | None

    @property
    def canonical(self) -> str:
        """`docker-archive:FILE[:NAME]`."""
        return f"docker-archive:{self.path}" + (f":{self.tag}" if self.tag else "")


Reference: TypeAlias = RegistryReference | LayoutReference | ArchiveReference


def is_tag(text: str) -> bool:
    """Whether a text may stand where a tag does."""
    return _TAG.match(text) is not None


def parse_reference(text: str, *, base: Path | None = None) -> Reference:
    """Parse `HOST/REPO[:TAG][@DIGEST]`, `oci:DIR[:TAG]` or `docker-archive:FILE[:NAME]`.

    `base` makes relative paths absolute, lexically. Of an archive's text the first colon after
    the scheme ends the file name; of a layout's the last one does, where what follows is a tag.
    Raises `UsageError`.
    """
    if len(text) > _MAX_TEXT:
        raise _refused(text, f"it has {len(text)} characters")
    if not text.isprintable() or text != text.strip():
        raise _refused(text, "it has spaces at an end or characters that do not print")
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "oci":
        return _layout(text, rest, base)
    if colon and scheme == "docker-archive":
        return _archive(text, rest, base)
    return _registry(text)


def parse_archive_name(text: str) -> str:
    """An image's name inside a docker archive, as a canonical registry name."""
    return _registry(text).canonical


def _layout(text: str, rest: str, base: Path | None) -> LayoutReference:
    path, colon, tag = rest.rpartition(":")
    if not colon:
        return LayoutReference(_path(text, rest, base), None)
    if not tag:
        raise _refused(text, "the tag after the colon is empty")
    if "/" in tag:  # the colon belongs to the directory's name
        return LayoutReference(_path(text, rest, base), None)
    if not _TAG.match(tag):
        raise _refused(text, "the tag is not of a tag's form")
    return LayoutReference(_path(text, path, base), tag)


def _archive(text: str, rest: str, base: Path | None) -> ArchiveReference:
    path, colon, name = rest.partition(":")
    if not colon:
        return ArchiveReference(_path(text, path, base), None)
    if not name:
        raise _refused(text, "the name after the colon is empty")
    return ArchiveReference(_path(text, path, base), parse_archive_name(name))


def _path(text: str, path: str, base: Path | None) -> Path:
    if not path or len(path) > 4096:
        raise _refused(text, "its path is empty or too long")
    return base / path if base is not None else Path(path)


def _registry(text: str) -> RegistryReference:
    if not text:
        raise _refused(text, "it is empty")
    if not text.isascii():
        raise _refused(text, "it has characters outside ASCII")
    name, at, digest_text = text.partition("@")
    digest: Digest | None = None
    if at:
        try:
            digest = Digest.parse(digest_text)
        except Rejected as error:
            raise _refused(text, error.message) from None
    first, slash, remainder = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host = _host(text, first)
    else:
        host, remainder = DOCKER_HUB, name
    repository, colon, tag = remainder.partition(":")
    if colon and not _TAG.match(tag):
        raise _refused(text, "the tag is empty or not of a tag's form")
    if not _REPOSITORY.match(repository):
        hint = "must be lower case" if repository != repository.lower() else "is not well formed"
        raise _refused(text, f"the repository name {hint}")
    if host in {"index.docker.io", "registry-1.docker.io"}:
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in repository:
        if _HEX_ID.match(repository):
            raise _refused(text, "64 hex digits are an image id, not a name")
        repository = f"library/{repository}"
    if len(host) + 1 + len(repository) > _MAX_NAME:
        raise _refused(text, f"host and repository have more than {_MAX_NAME} characters")
    parsed = RegistryReference(host, repository, tag or None, digest)
    return parsed if tag or digest else replace(parsed, tag="latest")


def _host(text: str, host: str) -> str:
    match = _HOST.match(host.lower())
    if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise _refused(text, "the registry's host or port is not well formed")
    if match["name"].startswith("["):
        try:
            ipaddress.IPv6Address(match["name"][1:-1])
        except ValueError:
            raise _refused(text, "the registry's address is not IPv6") from None
    return match[0]


def _refused(text: str, reason: str) -> UsageError:
    return UsageError(
        f"not an image reference: {text[:120]!a}: {reason}",
        remedy="write HOST/REPO[:TAG][@DIGEST], oci:DIR[:TAG] or docker-archive:FILE",
    )
