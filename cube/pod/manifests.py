"""A manifest file to pods and sets: the entry of this package. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cube.pod.containers import normalise_container
from cube.pod.kubernetes import (
    ClaimManifest,
    ConfigMapManifest,
    Metadata,
    PodManifest,
    PodSecurityContext,
    PodSpec,
    SecretManifest,
    SetManifest,
    WrittenContainer,
)
from cube.pod.model import (
    DRIVERS,
    BlockVolume,
    Container,
    FilesVolume,
    HostAlias,
    Limits,
    NfsVolume,
    ObjectVolume,
    Pod,
    PodSet,
    RestartPolicy,
    Volume,
)
from cube.pod.places import Place, one_of, read
from cube.pod.sources import Sources
from cube.pod.volumes import Policy, Surroundings, memory, normalise_volume
from cube.pod.yamltree import Document, parse
from imagecache.errors import Rejected

CONTAINER_LIMIT: Final = 20  # of a pod, init containers among them: a microVM has 24 device slots
VOLUME_LIMIT: Final = 64
REPLICA_LIMIT: Final = 1000
DISK_BYTES: Final = "cubecache/disk-bytes-per-second"
DISK_OPERATIONS: Final = "cubecache/disk-operations-per-second"
PLATFORM: Final = "cubecache/platform"
DRIVER: Final = "cubecache/driver"
_SET_LABEL: Final = "cubecache/set"
_PERCENT = re.compile(r"(\d{1,3})%")
# Fields that place a pod among many hosts: read over, and said so.
_PLACEMENT: Final = (
    "nodeName",
    "nodeSelector",
    "affinity",
    "tolerations",
    "topologySpreadConstraints",
    "schedulerName",
    "priority",
    "priorityClassName",
)


@dataclass(slots=True)
class Manifests:
    """What a file asks for, and what in it is read over."""

    pods: list[Pod] = field(default_factory=list)
    sets: list[PodSet] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_manifests(raw: bytes, policy: Policy | None = None) -> Manifests:
    """The pods and sets of a file. ConfigMaps, Secrets and claims serve those of the same file.

    Raises Rejected, LimitExceeded or Denied, naming the field and its line.
    """
    documents = [_Kinded.of(document) for document in parse(raw)]
    sources = Sources()
    claims: dict[tuple[str, str], int] = {}
    for one in documents:
        if one.kind == "ConfigMap":
            sources.add("ConfigMap", one.place, read(ConfigMapManifest, one.place, one.value))
        elif one.kind == "Secret":
            sources.add("Secret", one.place, read(SecretManifest, one.place, one.value))
        elif one.kind == "PersistentVolumeClaim":
            _add_claim(claims, one)
    found = Manifests()
    reader = _Reader(sources, claims, policy or Policy(), found)
    names: set[str] = set()
    for one in documents:
        if one.kind == "Pod":
            key = reader.add_pod(one)
        elif one.kind in ("Deployment", "ReplicaSet"):
            key = reader.add_set(one)
        else:
            continue
        if key in names:
            one.place.reject(f"{key!r} stands twice in this file")
        names.add(key)
    if not names:
        raise Rejected("the manifest has no Pod and no Deployment")
    return found


_KINDS: Final = {
    "Pod": ("v1",),
    "ConfigMap": ("v1",),
    "Secret": ("v1",),
    "PersistentVolumeClaim": ("v1",),
    "Deployment": ("apps/v1", "v1"),
    "ReplicaSet": ("apps/v1",),
}


@dataclass(frozen=True, slots=True)
class _Kinded:
    kind: str
    place: Place
    value: Mapping[str, Any]

    @classmethod
    def of(cls, document: Document) -> _Kinded:
        value = document.value
        place = Place(document)
        if not isinstance(value, dict):
            place.reject("must be a mapping")
        kind, version = value.get("kind"), value.get("apiVersion")
        if not isinstance(kind, str) or kind not in _KINDS:
            (place / "kind").reject(
                f"{str(kind)[:60]!r} is not supported", remedy=f"known: {', '.join(_KINDS)}"
            )
        if version not in _KINDS[kind]:
            (place / "apiVersion").reject(
                f"{str(version)[:60]!r} is not supported for {kind}",
                remedy=f"known: {', '.join(_KINDS[kind])}",
            )
        meta = value.get("metadata")
        name = meta.get("name") if isinstance(meta, dict) else None
        shown = f"{kind} {name[:63]}" if isinstance(name, str) and name.isprintable() else kind
        return cls(kind, Place(document, whole=shown), value)


def _add_claim(claims: dict[tuple[str, str], int], one: _Kinded) -> None:
    manifest = read(ClaimManifest, one.place, one.value)
    name = (one.place / "metadata" / "name").name(manifest.metadata.name or "", dots=True)
    requests = (manifest.spec.resources.requests if manifest.spec.resources else None) or {}
    size, place = requests.get("storage"), one.place / "spec" / "resources" / "requests"
    if size is None or isinstance(size, float):
        place.reject("needs storage, such as 10Gi")
    for other in requests.keys() - {"storage"}:
        (place / other).reject("is not a resource of a claim")
    claims[(manifest.metadata.namespace, name)] = memory(size, place / "storage")


class _Reader:
    def __init__(
        self,
        sources: Sources,
        claims: dict[tuple[str, str], int],
        policy: Policy,
        found: Manifests,
    ) -> None:
        self._sources = sources
        self._claims = claims
        self._policy = policy
        self._found = found

    def add_pod(self, one: _Kinded) -> str:
        manifest = read(PodManifest, one.place, one.value)
        pod = self._pod(manifest.spec, one.place / "spec", manifest.metadata, one.place)
        self._found.pods.append(pod)
        return pod.key

    def add_set(self, one: _Kinded) -> str:
        manifest = read(SetManifest, one.place, one.value)
        spec, place = manifest.spec, one.place / "spec"
        name = (one.place / "metadata" / "name").name(manifest.metadata.name or "")
        namespace = manifest.metadata.namespace
        if (spec.template is None) == (spec.cube_pod_spec is None):
            place.reject("needs either template or cubePodSpec")
        if spec.template is not None:
            meta = spec.template.metadata or Metadata()
            pod_spec, here = spec.template.spec, place / "template" / "spec"
        elif spec.cube_pod_spec is not None:
            meta, pod_spec, here = Metadata(), spec.cube_pod_spec, place / "cubePodSpec"
        labels = {**(manifest.metadata.labels or {}), **(meta.labels or {})}
        for key, value in (spec.selector.match_labels if spec.selector else {}).items():
            if labels.get(key) != value:
                (place / "selector" / "matchLabels" / key).reject(
                    "is not a label of the template's pods"
                )
        labels[_SET_LABEL] = name
        meta = meta.model_copy(update={"name": name, "namespace": namespace, "labels": labels})
        template = self._pod(pod_spec, here, meta, one.place)
        if template.restart is not RestartPolicy.ALWAYS:
            (here / "restartPolicy").reject("of a set's pods is Always")
        if any(port.host_port for each in template.containers for port in each.ports):
            here.reject("a set's pods cannot share one hostPort")
        replicas = (place / "replicas").between(spec.replicas, 0, REPLICA_LIMIT)
        rolling = spec.strategy.rolling_update if spec.strategy else None
        where = place / "strategy" / "rollingUpdate"
        surge = _share(
            rolling.max_surge if rolling else None, replicas, where / "maxSurge", up=True
        )
        missing = _share(
            rolling.max_unavailable if rolling else 0, replicas, where / "maxUnavailable", up=False
        )
        if surge == 0 and missing == 0:
            where.reject("maxSurge and maxUnavailable cannot both be 0")
        whole = PodSet(
            name=name,
            namespace=namespace,
            replicas=replicas,
            template=template,
            max_surge=surge,
            max_unavailable=missing,
        )
        self._found.sets.append(whole)
        return whole.key

    def _pod(self, spec: PodSpec, place: Place, meta: Metadata, root: Place) -> Pod:
        about = root / "metadata"
        name = (about / "name").name(meta.name or "", dots=True)
        namespace = (about / "namespace").name(meta.namespace)
        for field_name in _PLACEMENT:
            if (*place.path, field_name) in place.document.lines:
                self._found.notes.append(f"{place / field_name} is read over: there is one host")
        if spec.image_pull_secrets:
            self._found.notes.append(
                f"{place / 'imagePullSecrets'} is checked and read over: the daemon pulls with its"
                " own credentials (registry.docker_config)"
            )
        security = spec.security_context or PodSecurityContext()
        around = Surroundings(self._sources, namespace, self._claims, self._policy)
        volumes = self._volumes(spec, place / "volumes", around)
        writable = {volume.name: _writable(volume) for volume in volumes}
        containers, first = self._containers(spec, place, namespace, writable, security)
        grace = spec.termination_grace_period_seconds
        deadline = spec.active_deadline_seconds
        hostname = spec.hostname or name.split(".")[0][:63].rstrip("-")
        dns, here = spec.dns_config, place / "dnsConfig"
        return Pod(
            name=name,
            namespace=namespace,
            labels=_labels(meta.labels or {}, about / "labels"),
            annotations=_annotations(meta.annotations or {}, about / "annotations"),
            containers=containers,
            init_containers=first,
            volumes=volumes,
            restart=RestartPolicy(spec.restart_policy),
            grace_seconds=(place / "terminationGracePeriodSeconds").between(grace, 0, 86400),
            deadline_seconds=0
            if deadline is None
            else (place / "activeDeadlineSeconds").between(deadline, 1, 2**31),
            hostname=(place / "hostname").name(hostname),
            host_aliases=_aliases(spec, place / "hostAliases"),
            nameservers=_printable(dns.nameservers if dns else None, here / "nameservers", 3),
            searches=_printable(dns.searches if dns else None, here / "searches", 32),
            dns_options=tuple(
                option.name if option.value is None else f"{option.name}:{option.value}"
                for option in (dns.options if dns else None) or []
            ),
            pull_secrets=self._sources.pull_secrets(
                spec.image_pull_secrets or [], namespace, place / "imagePullSecrets"
            ),
            fs_group=security.fs_group,
            limits=_rates(meta.annotations or {}, about / "annotations"),
            platform=(meta.annotations or {}).get(PLATFORM),
            driver=one_of(
                DRIVERS, (meta.annotations or {}).get(DRIVER), about / "annotations" / DRIVER
            ),
        )

    def _volumes(self, spec: PodSpec, place: Place, around: Surroundings) -> tuple[Volume, ...]:
        written = spec.volumes or []
        if len(written) > VOLUME_LIMIT:
            place.limit(f"has {len(written)} volumes, over {VOLUME_LIMIT}")
        volumes: list[Volume] = []
        names: set[str] = set()
        claims: set[str] = set()
        for index, source in enumerate(written):
            here = place / index
            volume = normalise_volume(source, here, around)
            if volume.name in names:
                (here / "name").reject(f"{volume.name!r} names two volumes")
            names.add(volume.name)
            if isinstance(volume, BlockVolume):
                if volume.claim in claims:
                    here.reject(f"names the disk {volume.claim!r} a second time")
                claims.add(volume.claim)
            volumes.append(volume)
        return tuple(volumes)

    def _containers(
        self,
        spec: PodSpec,
        place: Place,
        namespace: str,
        volumes: dict[str, bool],
        security: PodSecurityContext,
    ) -> tuple[tuple[Container, ...], tuple[Container, ...]]:
        if not spec.containers:
            (place / "containers").reject("is empty")
        first = spec.init_containers or []
        if len(spec.containers) + len(first) > CONTAINER_LIMIT:
            place.limit(f"has more than {CONTAINER_LIMIT} containers")
        names: set[str] = set()
        host_ports: set[tuple[str, int]] = set()

        def convert(written: list[WrittenContainer], here: Place, *, init: bool) -> list[Container]:
            converted: list[Container] = []
            for index, source in enumerate(written):
                container = normalise_container(
                    source,
                    here / index,
                    sources=self._sources,
                    namespace=namespace,
                    volumes=volumes,
                    pod=security,
                    init=init,
                )
                if container.name in names:
                    (here / index / "name").reject(f"{container.name!r} names two containers")
                names.add(container.name)
                for number, port in enumerate(container.ports):
                    taken = (port.protocol, port.host_port)
                    if port.host_port and taken in host_ports:
                        (here / index / "ports" / number).reject("takes a hostPort twice")
                    host_ports.add(taken)
                converted.append(container)
            return converted

        before = convert(first, place / "initContainers", init=True)
        return tuple(convert(spec.containers, place / "containers", init=False)), tuple(before)


def _writable(volume: Volume) -> bool:
    if isinstance(volume, FilesVolume):
        return False
    if isinstance(volume, NfsVolume | ObjectVolume | BlockVolume):
        return not volume.read_only
    return True


def _labels(labels: dict[str, str], place: Place) -> dict[str, str]:
    if len(labels) > 256:
        place.limit(f"has {len(labels)} labels, over 256")
    for key, value in labels.items():
        if len(key) > 317 or len(value) > 63 or not (key + value).isprintable() or not key:
            (place / key).reject("is no label: at most 63 printable characters")
    return labels


def _annotations(annotations: dict[str, str], place: Place) -> dict[str, str]:
    total = sum(len(key) + len(value) for key, value in annotations.items())
    if total > 256 * 1024:
        place.limit(f"holds {total} characters, over {256 * 1024}")
    return annotations


def _rates(annotations: dict[str, str], place: Place) -> Limits:
    found = {}
    for name in (DISK_BYTES, DISK_OPERATIONS):
        if name in annotations:
            found[name] = memory(annotations[name], place / name)
    return Limits(
        disk_bytes=found.get(DISK_BYTES, 0), disk_operations=found.get(DISK_OPERATIONS, 0)
    )


def _aliases(spec: PodSpec, place: Place) -> tuple[HostAlias, ...]:
    aliases: list[HostAlias] = []
    for index, alias in enumerate(spec.host_aliases or []):
        here = place / index
        names = _printable(alias.hostnames, here / "hostnames", 100)
        address = _printable([alias.ip], here / "ip", 1)[0]
        aliases.append(HostAlias(ip=address, names=names))
    return tuple(aliases)


def _printable(texts: list[str] | None, place: Place, limit: int) -> tuple[str, ...]:
    texts = texts or []
    if len(texts) > limit:
        place.limit(f"has {len(texts)} entries, over {limit}")
    for index, text in enumerate(texts):
        if not text or len(text) > 253 or not text.isprintable() or " " in text:
            (place / index).reject("is no address or name")
    return tuple(texts)


def _share(value: int | str | None, replicas: int, place: Place, *, up: bool) -> int:
    if value is None:
        value = "25%"
    if isinstance(value, str):
        match = _PERCENT.fullmatch(value)
        if match is None or int(match[1]) > 100:
            place.reject(f"{value[:40]!r} is no share, such as 25% or 1")
        share = replicas * int(match[1])
        value = (share + 99) // 100 if up else share // 100
    return place.between(value, 0, REPLICA_LIMIT)
