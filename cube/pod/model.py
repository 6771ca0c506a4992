"""The one typed model of a pod that everything in cube works from; JSON in and out. Pure.

Sizes are bytes, processors thousandths, times seconds. Values that only the running pod knows (its
address, its uid) stay references, `field`, until it starts.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Base of every part: immutable, strict, bytes as base64 in JSON, no unknown fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class RestartPolicy(enum.StrEnum):
    """When a container that ended is started again."""

    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"


class Variable(Part):
    """An environment variable: `value`, or where `field` is set what that names once it runs."""

    name: str
    value: str = ""
    field: str = ""


class Port(Part):
    """A port that a container says it listens on; `host_port` 0 means not from outside."""

    container_port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    protocol: str = "TCP"
    name: str = ""


class Mount(Part):
    """A volume in a container."""

    volume: str
    path: str
    sub_path: str = ""
    read_only: bool = False


class Check(Part):
    """Something to ask a container: a command in it, an HTTP GET, or a connection."""

    kind: Literal["exec", "http", "tcp"]
    command: tuple[str, ...] = ()
    port: int = 0
    path: str = "/"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Probe(Part):
    """A check that is made again and again."""

    check: Check
    initial_delay: int = 0
    period: int = 10
    timeout: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


class Security(Part):
    """What a container may do; None is the image's or the custom's choice."""

    user: str | None = None
    groups: tuple[int, ...] = ()
    privileged: bool = False
    no_new_privileges: bool = False
    read_only_root: bool = False
    non_root: bool = False
    add: tuple[str, ...] = ()  # capabilities
    drop: tuple[str, ...] = ()


class Container(Part):
    """One container, its references to ConfigMaps and Secrets already resolved."""

    name: str
    image: str
    pull: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    environment: tuple[Variable, ...] = ()
    working_directory: str | None = None
    ports: tuple[Port, ...] = ()
    mounts: tuple[Mount, ...] = ()
    cpu_millis: int = 0  # limits; 0 is none
    memory_bytes: int = 0
    startup: Probe | None = None
    readiness: Probe | None = None
    liveness: Probe | None = None
    post_start: Check | None = None
    pre_stop: Check | None = None
    security: Security = Security()
    stdin: bool = False
    tty: bool = False


class VolumeFile(Part):
    """A file of a files volume: `content`, or what `field` names once the pod runs."""

    path: str
    mode: int
    content: bytes = Field(default=b"", repr=False)
    field: str = ""


class FilesVolume(Part):
    """ConfigMap, Secret, downward API and projected volumes."""

    kind: Literal["files"] = "files"
    name: str
    files: tuple[VolumeFile, ...]


class EmptyVolume(Part):
    """Room that lives as long as the pod."""

    kind: Literal["empty"] = "empty"
    name: str
    memory: bool = False
    size_bytes: int = 0  # 0 is the medium's default


class NfsVolume(Part):
    """A directory of an NFS server, mounted by the guest."""

    kind: Literal["nfs"] = "nfs"
    name: str
    server: str
    path: str
    options: str = ""
    read_only: bool = False


class ObjectVolume(Part):
    """A bucket, mounted by the guest through s3fs."""

    kind: Literal["s3"] = "s3"
    name: str
    endpoint: str
    bucket: str
    prefix: str = ""
    access_key: str = Field(default="", repr=False)
    secret_key: str = Field(default="", repr=False)
    options: str = ""
    read_only: bool = False


class BlockVolume(Part):
    """A disk that outlives pods, known by its claim's name."""

    kind: Literal["block"] = "block"
    name: str
    claim: str
    file_system: Literal["ext4"] = "ext4"
    size_bytes: int = 0  # of a disk that does not exist yet
    format: bool = False  # make the file system anew even if there is one
    read_only: bool = False


class HostVolume(Part):
    """A directory of the host, where policy allows it."""

    kind: Literal["host"] = "host"
    name: str
    path: str


Volume = Annotated[
    FilesVolume | EmptyVolume | NfsVolume | ObjectVolume | BlockVolume | HostVolume,
    Field(discriminator="kind"),
]


class PullSecret(Part):
    """Credentials of one registry."""

    server: str
    username: str
    password: str = Field(repr=False)


class HostAlias(Part):
    """An address and its names, for /etc/hosts."""

    ip: str
    names: tuple[str, ...]


class Limits(Part):
    """Rates of the machine's devices, a second; 0 is none."""

    disk_bytes: int = 0
    disk_operations: int = 0


DriverName = Literal["qemu", "firecracker"]
DRIVERS: Final[tuple[DriverName, ...]] = ("qemu", "firecracker")


class Pod(Part):
    """A pod as it is asked for."""

    name: str
    namespace: str = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    restart: RestartPolicy = RestartPolicy.ALWAYS
    grace_seconds: int = 30
    deadline_seconds: int = 0  # of the whole pod; 0 is none
    hostname: str = ""
    host_aliases: tuple[HostAlias, ...] = ()
    nameservers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    pull_secrets: tuple[PullSecret, ...] = ()
    fs_group: int | None = None
    limits: Limits = Limits()
    platform: str | None = None
    driver: DriverName | None = None  # of its machine; None is the caller's

    @property
    def key(self) -> str:
        """The name that commands use: NAME, or NAMESPACE/NAME outside of `default`."""
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"


class PodSet(Part):
    """N pods of one template. The pods are named SET-SUFFIX and labelled with the set's name."""

    name: str
    namespace: str = "default"
    replicas: int
    template: Pod
    max_surge: int = 1
    max_unavailable: int = 0

    @property
    def key(self) -> str:
        """The name that commands use."""
        return self.name if self.namespace == "default" else f"{self.namespace}/{self.name}"
