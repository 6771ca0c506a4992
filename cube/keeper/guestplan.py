"""From a pod and its images to what its machine is told. Pure.

Kubernetes' rules for commands and variables: `command` stands for the image's entrypoint and drops
its command, `args` for its command; $(NAME) is replaced, $$(NAME) is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from cube.configdisk import GuestConfig
from cube.container import (
    ALL_CAPABILITIES,
    DEFAULT_CAPABILITIES,
    ContainerSpec,
    ImageDefaults,
    Overrides,
    compose,
)
from cube.pod.capabilities import CAPABILITIES
from cube.pod.model import (
    BlockVolume,
    Container,
    EmptyVolume,
    FilesVolume,
    HostVolume,
    NfsVolume,
    ObjectVolume,
    Pod,
    Security,
)
from cube.vm.seam import MIB
from cube.volumes import Interface, Mount, Volume, VolumeFile, VolumeKind
from imagecache.errors import Unsupported, UsageError

TOOLS_SERIAL: Final = "cube-tools"
OVERHEAD_BYTES: Final = 128 * MIB  # the guest's kernel, agent and page tables
UNLIMITED_BYTES: Final = 256 * MIB  # what a container without a limit counts for
_DISCARD_MILLISECONDS: Final = 5000
_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_ROOT_USERS: Final = ("", "0", "root")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a pod once it is placed; without a `mac` it has no network card."""

    uid: str
    address: str
    host_address: str
    host_name: str
    mac: str
    prefix: int = 24
    gateway: str = ""
    nameserver: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """A container's image as exported."""

    defaults: ImageDefaults
    file_system: str


@dataclass(frozen=True, slots=True)
class DiskWish:
    """A disk that a volume needs on the host: an EmptyDir's (no claim), or a claim's."""

    serial: str
    size_bytes: int = 0
    claim: str = ""
    format: bool = False
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A machine to start."""

    config: GuestConfig
    disks: Sequence[DiskWish]
    memory_bytes: int
    cpus: int
    wants_tools: bool
    names: Mapping[int, str] = field(default_factory=dict)  # containers by their id in the guest


def container_ids(pod: Pod) -> dict[str, int]:
    """Every container's id in the guest, init containers first."""
    every = (*pod.init_containers, *pod.containers)
    return {container.name: number for number, container in enumerate(every, 1)}


def root_serial(identity: int) -> str:
    """The serial of a container's root disk."""
    return f"root-{identity}"


def plan_machine(pod: Pod, images: Mapping[str, Image], facts: Facts, *, sync_key: bytes) -> Plan:
    """What to boot; raises UsageError, LimitExceeded, Unsupported naming the container."""
    ids = container_ids(pod)
    specs = tuple(
        _container(pod, container, images[container.name], facts, ids[container.name])
        for container in (*pod.init_containers, *pod.containers)
    )
    volumes: list[Volume] = []
    disks: list[DiskWish] = []
    for number, volume in enumerate(pod.volumes, 1):
        planned, wish = _volume(volume, pod, facts, f"vol-{number}")
        volumes.append(planned)
        if wish is not None:
            disks.append(wish)
    wants_tools = any(isinstance(volume, ObjectVolume) for volume in pod.volumes)
    modules = ["net"]
    if any(isinstance(volume, NfsVolume) for volume in pod.volumes):
        modules.append("nfs")
    if wants_tools:
        modules.append("fuse")
    main = [_memory(container) for container in pod.containers]
    before = [_memory(container) for container in pod.init_containers]
    in_memory = sum(
        volume.size_bytes
        for volume in pod.volumes
        if isinstance(volume, EmptyVolume) and volume.memory
    )
    memory = max(sum(main), *before, 0) + in_memory + OVERHEAD_BYTES
    millis = max(
        sum(container.cpu_millis for container in pod.containers),
        *(container.cpu_millis for container in pod.init_containers),
        0,
    )
    config = GuestConfig(
        containers=specs,
        hostname=pod.hostname,
        resolv_conf=_resolv(pod, facts),
        hosts=_hosts(pod, facts),
        modules=tuple(modules),
        interfaces=(
            Interface(
                mac=facts.mac,
                addresses=(f"{facts.address}/{facts.prefix}",),
                gateway=facts.gateway,
            ),
        )
        if facts.mac
        else (),
        volumes=tuple(volumes),
        tools_disk=TOOLS_SERIAL if wants_tools else "",
        sync_key=sync_key,
    )
    return Plan(
        config=config,
        disks=tuple(disks),
        memory_bytes=-(-memory // MIB) * MIB,
        cpus=max(1, -(-millis // 1000)),
        wants_tools=wants_tools,
        names={number: name for name, number in ids.items()},
    )


def variables(pod: Pod, container: Container, facts: Facts) -> dict[str, str]:
    """A container's own variables, references resolved; in the order of the manifest."""
    values: dict[str, str] = {}
    for one in container.environment:
        if one.field:
            values[one.name] = field_value(one.field, pod, facts, container)
        else:
            values[one.name] = expand(one.value, values)
    return values


def expand(text: str, values: Mapping[str, str]) -> str:
    """$(NAME) replaced where NAME is known; $$ is a plain $."""

    def replaced(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$"
        return values.get(match[1], match[0])

    return _REFERENCE.sub(replaced, text)


def field_value(name: str, pod: Pod, facts: Facts, container: Container | None) -> str:
    """What a downward API reference names."""
    if name.startswith("resource:"):
        _, wanted, resource = name.split(":", 2)
        every = {one.name: one for one in (*pod.init_containers, *pod.containers)}
        chosen = every.get(wanted) if wanted else container
        if chosen is None:
            raise UsageError(f"a resource field names container {wanted!r}, which is not there")
        if resource.endswith(".cpu"):
            return str(max(1, -(-chosen.cpu_millis // 1000)))
        return str(chosen.memory_bytes or UNLIMITED_BYTES)
    for prefix, texts in (
        ("metadata.labels", pod.labels),
        ("metadata.annotations", pod.annotations),
    ):
        if name == prefix:
            return "\n".join(f'{key}="{_escaped(value)}"' for key, value in sorted(texts.items()))
        if name.startswith(f"{prefix}['"):
            return texts.get(name[len(prefix) + 2 : -2], "")
    known = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": facts.uid,
        "spec.nodeName": facts.host_name,
        "spec.serviceAccountName": "default",
        "status.podIP": facts.address,
        "status.podIPs": facts.address,
        "status.hostIP": facts.host_address,
        "status.hostIPs": facts.host_address,
    }
    return known[name]


def capability_bits(security: Security) -> int:
    """The capabilities that root keeps."""
    if security.privileged:
        return ALL_CAPABILITIES
    kept = DEFAULT_CAPABILITIES
    if "ALL" in security.drop:
        kept = 0
    if "ALL" in security.add:
        kept = ALL_CAPABILITIES
    for name in security.drop:
        kept &= ~(1 << CAPABILITIES[name]) if name != "ALL" else -1
    for name in security.add:
        kept |= 1 << CAPABILITIES[name] if name != "ALL" else 0
    return kept


def _container(
    pod: Pod, container: Container, image: Image, facts: Facts, identity: int
) -> ContainerSpec:
    own = variables(pod, container, facts)
    command = tuple(expand(word, own) for word in container.command)
    args = tuple(expand(word, own) for word in container.args)
    defaults = image.defaults
    entrypoint = command or defaults.entrypoint
    words = args or (() if command else defaults.command)
    security = container.security
    try:
        spec = compose(
            replace(defaults, entrypoint=entrypoint, command=words),
            Overrides(
                environment=own,
                user=security.user,
                working_directory=container.working_directory,
            ),
            hostname=pod.hostname,
        )
    except UsageError as error:
        raise UsageError(f"container {container.name}: {error.message}") from error
    if security.non_root and spec.user.partition(":")[0] in _ROOT_USERS:
        raise UsageError(
            f"container {container.name}: runAsNonRoot forbids the image's user, which is root",
            remedy="set runAsUser",
        )
    return replace(
        spec,
        id=identity,
        name=container.name,
        root_disk=root_serial(identity),
        root_fs=image.file_system,
        wants_stdin=container.stdin,
        capabilities=capability_bits(security),
        mounts=tuple(
            Mount(
                volume=mount.volume,
                path=mount.path,
                sub_path=mount.sub_path,
                read_only=mount.read_only,
            )
            for mount in container.mounts
        ),
        autostart=False,
        tty=container.tty,
        read_only_root=security.read_only_root,
        cpu_millis=container.cpu_millis,
        memory_bytes=container.memory_bytes,
        groups=security.groups,
        no_new_privileges=security.no_new_privileges,
        discard_after_ms=_DISCARD_MILLISECONDS,
    )


def _volume(volume: object, pod: Pod, facts: Facts, serial: str) -> tuple[Volume, DiskWish | None]:
    group = -1 if pod.fs_group is None else pod.fs_group
    if isinstance(volume, FilesVolume):
        files = tuple(
            VolumeFile(
                path=file.path,
                mode=file.mode,
                content=field_value(file.field, pod, facts, None).encode()
                if file.field
                else file.content,
                gid=pod.fs_group or 0,
            )
            for file in volume.files
        )
        return Volume(volume.name, VolumeKind.FILES, files=files, mode=0o755), None
    if isinstance(volume, EmptyVolume):
        if volume.memory:
            kind, size = VolumeKind.MEMORY, volume.size_bytes
            return Volume(volume.name, kind, size_bytes=size, gid=group), None
        planned = Volume(volume.name, VolumeKind.DISK, disk=serial, gid=group)
        return planned, DiskWish(serial, size_bytes=volume.size_bytes)
    if isinstance(volume, NfsVolume):
        return Volume(
            volume.name,
            VolumeKind.NFS,
            source=f"{volume.server}:{volume.path}",
            options=volume.options,
            read_only=volume.read_only,
        ), None
    if isinstance(volume, ObjectVolume):
        options = [f"url={volume.endpoint}", "use_path_request_style"]
        if volume.options:
            options.append(volume.options)
        bucket = volume.bucket + (f":/{volume.prefix.strip('/')}" if volume.prefix else "")
        return Volume(
            volume.name,
            VolumeKind.S3,
            source=bucket,
            options=",".join(options),
            secret=f"{volume.access_key}:{volume.secret_key}".encode(),
            read_only=volume.read_only,
        ), None
    if isinstance(volume, BlockVolume):
        planned = Volume(
            volume.name, VolumeKind.DISK, disk=serial, gid=group, read_only=volume.read_only
        )
        return planned, DiskWish(
            serial,
            size_bytes=volume.size_bytes,
            claim=volume.claim,
            format=volume.format,
            read_only=volume.read_only,
        )
    name = volume.name if isinstance(volume, HostVolume) else "?"
    raise Unsupported(
        f"volume {name}: directories of the host cannot be given to a machine on this host",
        remedy="export the directory over NFS, or use a claim",
    )


def _memory(container: Container) -> int:
    return container.memory_bytes or UNLIMITED_BYTES


def _resolv(pod: Pod, facts: Facts) -> bytes:
    servers = pod.nameservers or ((facts.nameserver,) if facts.nameserver else ())
    lines = [f"nameserver {server}" for server in servers]
    if pod.searches:
        lines.append(f"search {' '.join(pod.searches)}")
    if pod.dns_options:
        lines.append(f"options {' '.join(pod.dns_options)}")
    return "".join(f"{line}\n" for line in lines).encode()


def _hosts(pod: Pod, facts: Facts) -> bytes:
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost"]
    lines.append(f"{facts.address}\t{pod.hostname}")
    lines += [f"{alias.ip}\t{' '.join(alias.names)}" for alias in pod.host_aliases]
    return "".join(f"{line}\n" for line in lines).encode()


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def directory_of(state: Path, uid: str) -> Path:
    """Where everything of one pod is kept on the host."""
    return state / "pods" / uid
