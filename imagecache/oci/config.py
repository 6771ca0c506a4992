"""The image configuration: which layers make the root file system, and how a process starts.

Source: OCI image configuration specification; docker's container config has the same members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imagecache.errors import Rejected
from imagecache.oci.descriptor import as_list, as_object, string_map, strings, text
from imagecache.oci.digest import Digest
from imagecache.oci.platform import Platform
from imagecache.oci.strictjson import parse_object

_MAX_STRINGS = 16_384


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """A parsed image configuration; absent members are empty or None.

    `diff_ids` are the digests of the uncompressed layers, lowest first.
    """

    platform: Platform
    diff_ids: tuple[Digest, ...]
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def os(self) -> str:
        """The operating system, Go's GOOS; empty where the configuration names none."""
        return self.platform.os

    @property
    def architecture(self) -> str:
        """The architecture, Go's GOARCH; empty where the configuration names none."""
        return self.platform.architecture


def parse_config(raw: bytes, *, limit: int, max_layers: int, what: str) -> ImageConfig:
    """Parse an image configuration of at most `limit` bytes; raises `Rejected`."""
    members = parse_object(raw, limit=limit, what=what)
    rootfs = as_object(members.get("rootfs"), f"{what}: rootfs")
    if rootfs.get("type") != "layers":
        raise Rejected(f"{what}: rootfs.type is not 'layers'")
    listed = rootfs.get("diff_ids")
    diff_ids = as_list(
        [] if listed is None else listed, f"{what}: rootfs.diff_ids", limit=max_layers
    )
    runtime = members.get("config")
    run = as_object({} if runtime is None else runtime, f"{what}: config")

    def words(key: str) -> tuple[str, ...]:
        return strings(run.get(key), f"{what}: config.{key}", limit=_MAX_STRINGS)

    def word(key: str) -> str:
        return text(run.get(key), f"{what}: config.{key}") or ""

    return ImageConfig(
        platform=Platform(
            text(members.get("os"), f"{what}: os") or "",
            text(members.get("architecture"), f"{what}: architecture") or "",
            text(members.get("variant"), f"{what}: variant") or None,
        ),
        diff_ids=tuple(Digest.parse(diff_id) for diff_id in diff_ids),
        env=words("Env"),
        entrypoint=words("Entrypoint"),
        cmd=words("Cmd"),
        user=word("User"),
        working_dir=word("WorkingDir"),
        stop_signal=word("StopSignal"),
        labels=string_map(run.get("Labels"), f"{what}: config.Labels"),
    )
