"""Containers: their written form, normalised. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cube.pod.capabilities import CAPABILITIES
from cube.pod.kubernetes import (
    EnvFrom,
    EnvVar,
    Handler,
    PodSecurityContext,
    SecurityContext,
    VolumeMount,
    WrittenContainer,
    WrittenProbe,
)
from cube.pod.model import Check, Container, Mount, Port, Probe, Security, Variable
from cube.pod.places import Place
from cube.pod.quantity import parse_cpu
from cube.pod.sources import Sources
from cube.pod.volumes import check_field, check_resource, memory
from imagecache.errors import UsageError

ARGUMENT_LIMIT: Final = 4096
VARIABLE_LIMIT: Final = 4096
TEXT_LIMIT: Final = 128 * 1024  # bytes of one argument or variable (Linux's MAX_ARG_STRLEN)
IMAGE_LIMIT: Final = 4096
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")


def normalise_container(
    written: WrittenContainer,
    place: Place,
    *,
    sources: Sources,
    namespace: str,
    volumes: dict[str, bool],
    pod: PodSecurityContext,
    init: bool,
) -> Container:
    """One container. `volumes` are the pod's, with whether they can be written."""
    (place / "name").name(written.name)
    _image(written.image, place / "image")
    command = _words(written.command or [], place / "command")
    args = _words(written.args or [], place / "args")
    ports = _ports(written, place / "ports")
    probes = {"startupProbe": None, "readinessProbe": None, "livenessProbe": None}
    for field, source in (
        ("startupProbe", written.startup_probe),
        ("readinessProbe", written.readiness_probe),
        ("livenessProbe", written.liveness_probe),
    ):
        if source is not None and init:
            (place / field).reject("is not for an init container")
        probes[field] = _probe(source, place / field, ports) if source else None  # type: ignore[assignment]  # literal dict is inferred as None-valued
    cpu, size = _limits(written, place / "resources")
    lifecycle = written.lifecycle
    hooks: dict[str, Check | None] = {"postStart": None, "preStop": None}
    if lifecycle is not None:
        here = place / "lifecycle"
        if init:
            here.reject("is not for an init container")
        for field, handler in (
            ("postStart", lifecycle.post_start),
            ("preStop", lifecycle.pre_stop),
        ):
            hooks[field] = _check(handler, here / field, ports) if handler else None
    return Container(
        name=written.name,
        image=written.image,
        pull=written.image_pull_policy,
        command=command,
        args=args,
        environment=_environment(written, place, sources, namespace),
        working_directory=_directory(written.working_dir, place / "workingDir"),
        ports=ports,
        mounts=_mounts(written.volume_mounts or [], place / "volumeMounts", volumes),
        cpu_millis=cpu,
        memory_bytes=size,
        startup=probes["startupProbe"],
        readiness=probes["readinessProbe"],
        liveness=probes["livenessProbe"],
        post_start=hooks["postStart"],
        pre_stop=hooks["preStop"],
        security=_security(written.security_context, pod, place / "securityContext"),
        stdin=written.stdin,
        tty=written.tty,
    )


def _image(image: str, place: Place) -> None:
    if not image or len(image) > IMAGE_LIMIT or not image.isprintable() or " " in image:
        place.reject("is no reference of an image")


def _directory(directory: str | None, place: Place) -> str | None:
    if directory is not None:
        _text(directory, place, limit=4095)
        if directory and not directory.startswith("/"):
            place.reject(f"{directory[:80]!r} is not an absolute path")
    return directory or None


def _words(words: Sequence[str], place: Place) -> tuple[str, ...]:
    if len(words) > ARGUMENT_LIMIT:
        place.limit(f"has {len(words)} words, over {ARGUMENT_LIMIT}")
    for index, word in enumerate(words):
        _text(word, place / index)
    return tuple(words)


def _text(text: str, place: Place, *, limit: int = TEXT_LIMIT) -> None:
    if "\0" in text:
        place.reject("holds a NUL")
    if len(text.encode("utf-8", "surrogateescape")) >= limit:
        place.limit(f"has more than {limit - 1} bytes")


def _environment(
    written: WrittenContainer, place: Place, sources: Sources, namespace: str
) -> tuple[Variable, ...]:
    entries = written.env or []
    if len(entries) > VARIABLE_LIMIT:
        (place / "env").limit(f"has {len(entries)} variables, over {VARIABLE_LIMIT}")
    variables: dict[str, Variable] = {}
    for index, source in enumerate(written.env_from or []):
        here = place / "envFrom" / index
        for name, value in _env_from(source, here, sources, namespace).items():
            if _VARIABLE.fullmatch(name):  # as Kubernetes does: other keys are left out
                variables[name] = Variable(name=name, value=value)
    for index, entry in enumerate(entries):
        here = place / "env" / index
        if len(entry.name) > 1024 or not _VARIABLE.fullmatch(entry.name):
            (here / "name").reject(f"{entry.name[:60]!r} is no name of a variable")
        variable = _variable(entry, here, sources, namespace)
        if variable is not None:
            variables.pop(entry.name, None)
            variables[entry.name] = variable
    return tuple(variables.values())


def _env_from(source: EnvFrom, place: Place, sources: Sources, namespace: str) -> dict[str, str]:
    if (source.config_map_ref is None) == (source.secret_ref is None):
        place.reject("needs either configMapRef or secretRef")
    values: dict[str, bytes] = {}
    if source.config_map_ref is not None:
        ref, here = source.config_map_ref, place / "configMapRef" / "name"
        values = sources.find("ConfigMap", namespace, ref.name, here, optional=ref.optional) or {}
    elif source.secret_ref is not None:
        ref, here = source.secret_ref, place / "secretRef" / "name"
        values = sources.find("Secret", namespace, ref.name, here, optional=ref.optional) or {}
    return {source.prefix + key: _value(content, here / key) for key, content in values.items()}


def _variable(entry: EnvVar, place: Place, sources: Sources, namespace: str) -> Variable | None:
    if entry.value_from is None:
        value = entry.value or ""
        _text(value, place / "value")
        return Variable(name=entry.name, value=value)
    if entry.value:
        place.reject("has both value and valueFrom")
    origin, here = entry.value_from, place / "valueFrom"
    given = [
        one
        for one in (
            origin.config_map_key_ref,
            origin.secret_key_ref,
            origin.field_ref,
            origin.resource_field_ref,
        )
        if one is not None
    ]
    if len(given) != 1:
        here.reject("needs exactly one reference")
    if origin.field_ref is not None:
        path = check_field(origin.field_ref.field_path, here / "fieldRef" / "fieldPath")
        return Variable(name=entry.name, field=path)
    if origin.resource_field_ref is not None:
        field = check_resource(origin.resource_field_ref, here / "resourceFieldRef")
        return Variable(name=entry.name, field=field)
    ref = origin.config_map_key_ref or origin.secret_key_ref
    if ref is None:
        return None
    secret = origin.secret_key_ref is not None
    here = here / ("secretKeyRef" if secret else "configMapKeyRef")
    values = sources.find(
        "Secret" if secret else "ConfigMap",
        namespace,
        ref.name,
        here / "name",
        optional=ref.optional,
    )
    if values is None or ref.key not in values:
        if not ref.optional:
            (here / "key").reject(f"{ref.key!r} is not among the keys of {ref.name!r}")
        return None
    return Variable(name=entry.name, value=_value(values[ref.key], here))


def _value(content: bytes, place: Place) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        place.reject("is not UTF-8, as a variable must be")
    _text(text, place)
    return text


def _ports(written: WrittenContainer, place: Place) -> tuple[Port, ...]:
    ports: list[Port] = []
    for index, port in enumerate(written.ports or []):
        here = place / index
        (here / "containerPort").between(port.container_port, 1, 65535)
        (here / "hostPort").between(port.host_port, 0, 65535)
        if port.name:
            (here / "name").name(port.name)
            if port.name in {other.name for other in ports}:
                (here / "name").reject(f"{port.name!r} names two ports")
        ports.append(
            Port(
                container_port=port.container_port,
                host_port=port.host_port,
                host_ip=port.host_ip or "127.0.0.1",
                protocol=port.protocol,
                name=port.name,
            )
        )
    return tuple(ports)


def _mounts(
    written: Sequence[VolumeMount], place: Place, volumes: dict[str, bool]
) -> tuple[Mount, ...]:
    mounts: list[Mount] = []
    paths: set[str] = set()
    for index, mount in enumerate(written):
        here = place / index
        if mount.name not in volumes:
            (here / "name").reject(f"{mount.name!r} is not among the pod's volumes")
        path = "/" + mount.mount_path.strip("/")
        _text(path, here / "mountPath", limit=4095)
        if not mount.mount_path.startswith("/") or ".." in path.split("/") or path == "/":
            (here / "mountPath").reject(f"{mount.mount_path[:80]!r} is not a directory to mount on")
        if path in paths:
            (here / "mountPath").reject(f"{path!r} is mounted twice")
        paths.add(path)
        sub = mount.sub_path.strip("/")
        if ".." in sub.split("/") or "\0" in sub or mount.sub_path.startswith("/"):
            (here / "subPath").reject(f"{sub[:80]!r} is not a relative path without ..")
        mounts.append(
            Mount(
                volume=mount.name,
                path=path,
                sub_path=sub,
                read_only=mount.read_only or not volumes[mount.name],
            )
        )
    return tuple(mounts)


def _limits(written: WrittenContainer, place: Place) -> tuple[int, int]:
    """Processors (thousandths) and bytes of the limits; requests count where there is none."""
    found = {"cpu": 0, "memory": 0}
    if written.resources is None:
        return 0, 0
    for field, amounts in (
        ("requests", written.resources.requests or {}),
        ("limits", written.resources.limits or {}),
    ):
        for name, amount in amounts.items():
            here = place / field / name
            if name == "cpu":
                try:
                    value = parse_cpu(amount)
                except UsageError as error:
                    here.reject(f"is {error.message}")
            elif name == "memory":
                if isinstance(amount, float):
                    here.reject("must be a whole number of bytes, or text such as 256Mi")
                value = memory(amount, here)
            elif name == "ephemeral-storage":
                continue
            else:
                here.reject("is not a resource of this host")
            if field == "limits":
                found[name] = value
    return found["cpu"], found["memory"]


def _probe(written: WrittenProbe, place: Place, ports: Sequence[Port]) -> Probe:
    for field, number, low in (
        ("initialDelaySeconds", written.initial_delay_seconds, 0),
        ("periodSeconds", written.period_seconds, 1),
        ("timeoutSeconds", written.timeout_seconds, 1),
        ("successThreshold", written.success_threshold, 1),
        ("failureThreshold", written.failure_threshold, 1),
    ):
        (place / field).between(number, low, 86400)
    return Probe(
        check=_check(written, place, ports),
        initial_delay=written.initial_delay_seconds,
        period=written.period_seconds,
        timeout=written.timeout_seconds,
        success_threshold=written.success_threshold,
        failure_threshold=written.failure_threshold,
    )


def _check(handler: Handler, place: Place, ports: Sequence[Port]) -> Check:
    if sum(one is not None for one in (handler.exec, handler.http_get, handler.tcp_socket)) != 1:
        place.reject("needs exactly one of exec, httpGet and tcpSocket")
    if handler.exec is not None:
        words = _words(handler.exec.command, place / "exec" / "command")
        if not words:
            (place / "exec" / "command").reject("is empty")
        return Check(kind="exec", command=words)
    if handler.http_get is not None:
        get, here = handler.http_get, place / "httpGet"
        headers = tuple((header.name, header.value) for header in get.http_headers or [])
        for text in (get.path, get.host, *(part for header in headers for part in header)):
            if len(text) > 4096 or not text.isprintable():
                here.reject("holds control characters or more than 4096 of any")
        path = get.path if get.path.startswith("/") else f"/{get.path}"
        port = _port(get.port, here / "port", ports)
        return Check(kind="http", port=port, path=path, host=get.host, headers=headers)
    if handler.tcp_socket is None:
        place.reject("is empty")
    socket = handler.tcp_socket
    here = place / "tcpSocket"
    return Check(kind="tcp", port=_port(socket.port, here / "port", ports), host=socket.host)


def _port(port: int | str, place: Place, ports: Sequence[Port]) -> int:
    if isinstance(port, str):
        named = {one.name: one.container_port for one in ports if one.name}
        if port not in named:
            place.reject(f"{port[:60]!r} is not the name of one of the container's ports")
        return named[port]
    return place.between(port, 1, 65535)


def _security(written: SecurityContext | None, pod: PodSecurityContext, place: Place) -> Security:
    own = written or SecurityContext()
    user = pod.run_as_user if own.run_as_user is None else own.run_as_user
    group = pod.run_as_group if own.run_as_group is None else own.run_as_group
    for field, number in (("runAsUser", user), ("runAsGroup", group)):
        if number is not None:
            (place / field).between(number, 0, 2**31 - 1)
    if group is not None and user is None:
        place.reject("runAsGroup needs runAsUser")
    added, dropped = own.capabilities, own.capabilities
    groups = list(pod.supplemental_groups or [])
    if pod.fs_group is not None:
        groups.append(pod.fs_group)
    non_root = pod.run_as_non_root if own.run_as_non_root is None else own.run_as_non_root
    if non_root and user == 0:
        place.reject("runAsNonRoot forbids user 0")
    return Security(
        user=None if user is None else f"{user}" if group is None else f"{user}:{group}",
        groups=tuple(groups),
        privileged=own.privileged,
        no_new_privileges=own.allow_privilege_escalation is False,
        read_only_root=own.read_only_root_filesystem,
        non_root=bool(non_root),
        add=_capabilities(added.add if added else None, place / "capabilities" / "add"),
        drop=_capabilities(dropped.drop if dropped else None, place / "capabilities" / "drop"),
    )


def _capabilities(names: list[str] | None, place: Place) -> tuple[str, ...]:
    plain: list[str] = []
    for index, name in enumerate(names or []):
        short = name.upper().removeprefix("CAP_")
        if short != "ALL" and short not in CAPABILITIES:
            (place / index).reject(f"{name[:40]!r} is not a capability")
        plain.append(short)
    return tuple(plain)
