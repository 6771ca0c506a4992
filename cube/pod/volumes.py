"""Volumes: Kubernetes' and UCloud's forms of them, normalised. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from cube.pod.model import (
    BlockVolume,
    EmptyVolume,
    FilesVolume,
    HostVolume,
    NfsVolume,
    ObjectVolume,
    Volume,
    VolumeFile,
)
from cube.pod.places import Place, read
from cube.pod.quantity import parse_memory
from cube.pod.sources import Sources, check_size, decode
from cube.pod.written import ResourceFieldRef
from cube.pod.writtenvolumes import (
    ConfigMapSource,
    DownwardSource,
    KeyToPath,
    NfsSource,
    ProjectedSource,
    S3Source,
    SecretSource,
    WrittenVolume,
)
from imagecache.errors import UsageError

FIELDS: Final = frozenset(
    (
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "metadata.labels",
        "metadata.annotations",
        "spec.nodeName",
        "spec.serviceAccountName",
        "status.podIP",
        "status.podIPs",
        "status.hostIP",
        "status.hostIPs",
    )
)
_KEYED: Final = ("metadata.labels['", "metadata.annotations['")
_DEFAULT_MODE: Final = 0o644
_SOURCES: Final = (
    ("config_map", "configMap"),
    ("secret", "secret"),
    ("downward_api", "downwardAPI"),
    ("projected", "projected"),
    ("empty_dir", "emptyDir"),
    ("nfs", "nfs"),
    ("host_path", "hostPath"),
    ("persistent_volume_claim", "persistentVolumeClaim"),
    ("udisk", "udisk"),
    ("s3", "s3"),
)
# Keys that make a mapping Kubernetes' own and not the dialect's {key: text}.
_CONFIG_MAP_KEYS: Final = frozenset(("name", "items", "optional", "defaultMode"))
_SECRET_KEYS: Final = frozenset(("secretName", "items", "optional", "defaultMode"))


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator of the host allows."""

    host_paths: tuple[str, ...] = ()  # directories below which hostPath may point


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a volume may refer to."""

    sources: Sources
    namespace: str
    claims: dict[tuple[str, str], int]  # sizes of PersistentVolumeClaims in the file
    policy: Policy


def normalise_volume(written: WrittenVolume, place: Place, around: Surroundings) -> Volume:
    """One volume; raises Rejected, Denied, LimitExceeded."""
    (place / "name").name(written.name)
    given = [names for names in _SOURCES if getattr(written, names[0]) is not None]
    if len(given) != 1:
        listed = ", ".join(name for _, name in given) or "none"
        place.reject(f"{written.name!r} needs exactly one source of contents; it has {listed}")
    attribute, field = given[0]
    source, here = getattr(written, attribute), place / field
    if attribute == "config_map":
        return FilesVolume(name=written.name, files=_config_map(source, here, around))
    if attribute == "secret":
        return FilesVolume(name=written.name, files=_secret(source, here, around))
    if attribute == "downward_api":
        mode = _mode(source.default_mode, here / "defaultMode")
        return FilesVolume(name=written.name, files=_downward(source, mode, here))
    if attribute == "projected":
        return FilesVolume(name=written.name, files=_projected(source, here, around))
    if attribute == "empty_dir":
        size = memory(source.size_limit, here / "sizeLimit") if source.size_limit else 0
        return EmptyVolume(name=written.name, memory=source.medium == "Memory", size_bytes=size)
    if attribute == "nfs":
        return _nfs(written.name, source, here)
    if attribute == "host_path":
        path = check_host_path(source.path, here / "path", around.policy)
        return HostVolume(name=written.name, path=path)
    if attribute == "s3":
        return _object(written.name, source, here, around)
    if attribute == "udisk":
        claim = source.resource_name or source.id
        if not claim:
            here.reject("needs an id or a resourceName")
        return BlockVolume(
            name=written.name,
            claim=(here / "resourceName").name(claim, dots=True),
            file_system=source.fs,
            format=source.force_format,
        )
    claim = (here / "claimName").name(source.claim_name, dots=True)
    return BlockVolume(
        name=written.name,
        claim=claim,
        size_bytes=around.claims.get((around.namespace, claim), 0),
        read_only=source.read_only,
    )


def memory(value: str | int, place: Place) -> int:
    """A quantity of bytes."""
    try:
        return parse_memory(value)
    except UsageError as error:
        place.reject(f"is {error.message}")


def check_field(path: str, place: Place) -> str:
    """A downward API field that cube knows."""
    keyed = path.startswith(_KEYED) and path.endswith("']")
    if path not in FIELDS and not keyed:
        place.reject(f"names field {path[:80]!r}, which is not known here")
    return path


def check_resource(ref: ResourceFieldRef, place: Place) -> str:
    """A downward API resource of a container, as a field's name."""
    if ref.resource not in ("limits.cpu", "limits.memory", "requests.cpu", "requests.memory"):
        (place / "resource").reject(f"names {ref.resource[:60]!r}, which is not known here")
    if ref.divisor not in (None, 0, 1, "0", "1"):
        (place / "divisor").reject("other than 1 is not supported")
    return f"resource:{ref.container_name or ''}:{ref.resource}"


def check_host_path(path: str, place: Place, policy: Policy) -> str:
    """The path if the operator allows it; Denied for any other (J4)."""
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts or "\0" in path:
        place.reject(f"{path[:80]!r} is not an absolute path without ..")
    if len(pure.parts) < 2:
        place.deny("/ of the host is never given to a pod")
    if not any(pure.is_relative_to(allowed) for allowed in policy.host_paths):
        place.deny(
            f"{str(pure)[:200]!r} is not allowed on this host",
            remedy="the operator may allow directories: CUBECACHE_POD_HOST_PATHS=/srv/share",
        )
    return str(pure)


def _config_map(value: dict[str, Any], place: Place, around: Surroundings) -> tuple[Any, ...]:
    if value and value.keys() <= _CONFIG_MAP_KEYS:
        source = read(ConfigMapSource, place, value)
        found = around.sources.find(
            "ConfigMap", around.namespace, source.name, place / "name", optional=source.optional
        )
        mode = _mode(source.default_mode, place / "defaultMode")
        return _select(found or {}, source.items, mode, place, optional=source.optional)
    texts = _texts(value, place)
    return _inline({key: text.encode() for key, text in texts.items()}, place)


def _secret(value: dict[str, Any], place: Place, around: Surroundings) -> tuple[Any, ...]:
    if value and value.keys() <= _SECRET_KEYS:
        source = read(SecretSource, place, value)
        found = around.sources.find(
            "Secret",
            around.namespace,
            source.secret_name,
            place / "secretName",
            optional=source.optional,
        )
        mode = _mode(source.default_mode, place / "defaultMode")
        return _select(found or {}, source.items, mode, place, optional=source.optional)
    return _inline(decode(_texts(value, place), place), place)


def _texts(value: dict[str, Any], place: Place) -> dict[str, str]:
    for key, text in value.items():
        if not isinstance(text, str):
            (place / key).reject("must be text; quote it")
    return value


def _inline(values: dict[str, bytes], place: Place) -> tuple[VolumeFile, ...]:
    check_size(values, place)
    return tuple(
        VolumeFile(path=_relative(key, place / key), mode=_DEFAULT_MODE, content=content)
        for key, content in values.items()
    )


def _select(
    values: dict[str, bytes],
    items: list[KeyToPath] | None,
    mode: int,
    place: Place,
    *,
    optional: bool,
) -> tuple[VolumeFile, ...]:
    if items is None:
        return tuple(
            VolumeFile(path=_relative(key, place), mode=mode, content=content)
            for key, content in values.items()
        )
    files: list[VolumeFile] = []
    for index, item in enumerate(items):
        here = place / "items" / index
        if item.key not in values:
            if optional:
                continue
            (here / "key").reject(f"{item.key!r} is not among the keys")
        files.append(
            VolumeFile(
                path=_relative(item.path, here / "path"),
                mode=mode if item.mode is None else _mode(item.mode, here / "mode"),
                content=values[item.key],
            )
        )
    return _distinct(files, place)


def _downward(source: DownwardSource, mode: int, place: Place) -> tuple[VolumeFile, ...]:
    files: list[VolumeFile] = []
    for index, item in enumerate(source.items or []):
        here = place / "items" / index
        if (item.field_ref is None) == (item.resource_field_ref is None):
            here.reject("needs either fieldRef or resourceFieldRef")
        if item.field_ref is not None:
            field = check_field(item.field_ref.field_path, here / "fieldRef" / "fieldPath")
        elif item.resource_field_ref is not None:
            field = check_resource(item.resource_field_ref, here / "resourceFieldRef")
        files.append(
            VolumeFile(
                path=_relative(item.path, here / "path"),
                mode=mode if item.mode is None else _mode(item.mode, here / "mode"),
                field=field,
            )
        )
    return _distinct(files, place)


def _projected(
    source: ProjectedSource, place: Place, around: Surroundings
) -> tuple[VolumeFile, ...]:
    mode = _mode(source.default_mode, place / "defaultMode")
    files: list[VolumeFile] = []
    for index, part in enumerate(source.sources or []):
        here = place / "sources" / index
        if part.downward_api is not None:
            files += _downward(part.downward_api, mode, here / "downwardAPI")
        for kind, ref, field in (
            ("ConfigMap", part.config_map, "configMap"),
            ("Secret", part.secret, "secret"),
        ):
            if ref is not None:
                found = around.sources.find(
                    "Secret" if kind == "Secret" else "ConfigMap",
                    around.namespace,
                    ref.name,
                    here / field / "name",
                    optional=ref.optional,
                )
                files += _select(found or {}, ref.items, mode, here / field, optional=ref.optional)
    return _distinct(files, place)


def _nfs(name: str, source: NfsSource, place: Place) -> NfsVolume:
    if source.address is not None:
        server, colon, path = source.address.partition(":")
        if not colon:
            server, slash, rest = source.address.partition("/")
            path = slash + rest
    else:
        server, path = source.server or "", source.path or ""
    if not server or not path.startswith("/"):
        place.reject("needs server and path, or an address such as 10.0.0.5:/share")
    options = source.mount_option or ""
    if isinstance(options, list):
        options = ",".join(options)
    for text in (server, path, options):
        if len(text) > 1000 or not text.isprintable() or " " in text:
            place.reject("holds blanks, control characters or more than 1000 of them")
    return NfsVolume(
        name=name, server=server, path=path, options=options, read_only=source.read_only
    )


def _object(name: str, source: S3Source, place: Place, around: Surroundings) -> ObjectVolume:
    if not source.endpoint.startswith(("http://", "https://")):
        (place / "endpoint").reject("is not an http or https address")
    keys: dict[str, bytes] = {}
    if source.secret_ref is not None:
        here = place / "secretRef" / "name"
        keys = around.sources.find("Secret", around.namespace, source.secret_ref.name, here) or {}
        if not {"accessKey", "secretKey"} <= keys.keys():
            here.reject("names a Secret without the keys accessKey and secretKey")
    for text in (source.endpoint, source.bucket, source.prefix, source.options):
        if len(text) > 1000 or not text.isprintable() or " " in text:
            place.reject("holds blanks, control characters or more than 1000 of them")
    return ObjectVolume(
        name=name,
        endpoint=source.endpoint,
        bucket=source.bucket,
        prefix=source.prefix,
        access_key=keys.get("accessKey", b"").decode("utf-8", "replace"),
        secret_key=keys.get("secretKey", b"").decode("utf-8", "replace"),
        options=source.options,
        read_only=source.read_only,
    )


def _mode(mode: int | None, place: Place) -> int:
    if mode is None:
        return _DEFAULT_MODE
    return place.between(mode, 0, 0o777)


def _relative(path: str, place: Place) -> str:
    parts = path.split("/")
    if not path or len(path) > 1000 or any(part in ("", ".", "..") for part in parts):
        place.reject(f"{path[:80]!r} is not a relative path without ..")
    if "\0" in path or any(len(part.encode()) > 255 for part in parts):
        place.reject("holds a NUL, or a name of more than 255 bytes")
    return path


def _distinct(files: Collection[VolumeFile], place: Place) -> tuple[VolumeFile, ...]:
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            place.reject(f"puts two files at {file.path!r}")
        seen.add(file.path)
    return tuple(files)
