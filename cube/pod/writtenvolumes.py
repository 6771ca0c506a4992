"""Volumes as they are written: Kubernetes' sources, UCloud's, and cube's own `s3`. Pure."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from cube.pod.written import FieldRef, NamedRef, ResourceFieldRef, Written


class KeyToPath(Written):
    key: str
    path: str
    mode: int | None = None


class ConfigMapSource(Written):
    name: str
    items: list[KeyToPath] | None = None
    optional: bool = False
    default_mode: int | None = None


class SecretSource(Written):
    secret_name: str
    items: list[KeyToPath] | None = None
    optional: bool = False
    default_mode: int | None = None


class DownwardFile(Written):
    path: str
    field_ref: FieldRef | None = None
    resource_field_ref: ResourceFieldRef | None = None
    mode: int | None = None


class DownwardSource(Written):
    items: list[DownwardFile] | None = None
    default_mode: int | None = None


class ProjectedSecret(Written):
    name: str
    items: list[KeyToPath] | None = None
    optional: bool = False


class ProjectedPart(Written):
    config_map: ProjectedSecret | None = None
    secret: ProjectedSecret | None = None
    downward_api: DownwardSource | None = Field(default=None, alias="downwardAPI")


class ProjectedSource(Written):
    sources: list[ProjectedPart] | None = None
    default_mode: int | None = None


class EmptyDirSource(Written):
    medium: Literal["", "Memory"] = ""
    size_limit: str | int | None = None


class NfsSource(Written):
    """Kubernetes: server and path. UCloud: address (SERVER:PATH) and mountOption."""

    server: str | None = None
    path: str | None = None
    address: str | None = None
    mount_option: str | list[str] | None = None
    read_only: bool = False


class HostPathSource(Written):
    path: str
    type: Literal["", "Directory"] = ""


class ClaimSource(Written):
    claim_name: str
    read_only: bool = False


class UdiskSource(Written):
    """UCloud's block volume."""

    id: str | None = None
    resource_name: str | None = None
    fs: Literal["ext4"] = "ext4"
    force_format: bool = False


class S3Source(Written):
    """cube's own: a bucket of any S3-compatible store."""

    endpoint: str
    bucket: str
    prefix: str = ""
    secret_ref: NamedRef | None = None  # keys accessKey and secretKey
    options: str = ""
    read_only: bool = False


class WrittenVolume(Written):
    name: str
    config_map: dict[str, Any] | None = None
    secret: dict[str, Any] | None = None
    downward_api: DownwardSource | None = Field(default=None, alias="downwardAPI")
    projected: ProjectedSource | None = None
    empty_dir: EmptyDirSource | None = None
    nfs: NfsSource | None = None
    host_path: HostPathSource | None = None
    persistent_volume_claim: ClaimSource | None = None
    udisk: UdiskSource | None = None
    s3: S3Source | None = None
