"""Manifests as they are written: Kubernetes v1 fields that cube honours, and UCloud's dialect.

Pydantic models in strict mode; a field that is not declared is refused by name. Fields of type
`Ignored` are what an API server writes, or what means nothing on one host; they are read over.
Sources: kubernetes/api core/v1 and apps/v1; UCloudDoc-Team/cube.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cube.pod.written import (
    FieldRef,
    Ignored,
    KeyRef,
    NamedRef,
    ResourceFieldRef,
    Texts,
    Written,
)
from cube.pod.writtenvolumes import WrittenVolume


class Metadata(Written):
    name: str | None = None
    namespace: str = "default"
    labels: Texts | None = None
    annotations: Texts | None = None
    creation_timestamp: Ignored = None
    resource_version: Ignored = None
    generation: Ignored = None
    uid: Ignored = None
    self_link: Ignored = None
    managed_fields: Ignored = None
    owner_references: Ignored = None
    generate_name: Ignored = None


class ValueFrom(Written):
    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None
    field_ref: FieldRef | None = None
    resource_field_ref: ResourceFieldRef | None = None


class EnvVar(Written):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class EnvFrom(Written):
    prefix: str = ""
    config_map_ref: NamedRef | None = None
    secret_ref: NamedRef | None = None


class ContainerPort(Written):
    container_port: int
    name: str = ""
    protocol: Literal["TCP", "UDP"] = "TCP"
    host_port: int = 0
    host_ip: str | None = Field(default=None, alias="hostIP")


class VolumeMount(Written):
    name: str
    mount_path: str
    sub_path: str = ""
    read_only: bool = False
    mount_propagation: Literal["None"] | None = None


class Resources(Written):
    limits: dict[str, str | int | float] | None = None
    requests: dict[str, str | int | float] | None = None


class ExecAction(Written):
    command: list[str]


class HttpHeader(Written):
    name: str
    value: str


class HttpGetAction(Written):
    port: int | str
    path: str = "/"
    host: str = ""
    scheme: Literal["HTTP"] = "HTTP"
    http_headers: list[HttpHeader] | None = None


class TcpSocketAction(Written):
    port: int | str
    host: str = ""


class Handler(Written):
    exec: ExecAction | None = None
    http_get: HttpGetAction | None = None
    tcp_socket: TcpSocketAction | None = None


class WrittenProbe(Handler):
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


class Lifecycle(Written):
    post_start: Handler | None = None
    pre_stop: Handler | None = None


class Capabilities(Written):
    add: list[str] | None = None
    drop: list[str] | None = None


class SecurityContext(Written):
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None
    privileged: bool = False
    allow_privilege_escalation: bool | None = None
    read_only_root_filesystem: bool = False
    capabilities: Capabilities | None = None
    seccomp_profile: Ignored = None  # another kernel stands between the program and this host
    app_armor_profile: Ignored = None


class PodSecurityContext(Written):
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None
    supplemental_groups: list[int] | None = None
    fs_group: int | None = None
    fs_group_change_policy: Ignored = None
    seccomp_profile: Ignored = None
    app_armor_profile: Ignored = None


class WrittenContainer(Written):
    name: str
    image: str
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] | None = None
    env_from: list[EnvFrom] | None = None
    working_dir: str | None = None
    ports: list[ContainerPort] | None = None
    volume_mounts: list[VolumeMount] | None = None
    resources: Resources | None = None
    startup_probe: WrittenProbe | None = None
    readiness_probe: WrittenProbe | None = None
    liveness_probe: WrittenProbe | None = None
    lifecycle: Lifecycle | None = None
    security_context: SecurityContext | None = None
    stdin: bool = False
    tty: bool = False
    termination_message_path: Ignored = None
    termination_message_policy: Ignored = None


class WrittenAlias(Written):
    ip: str
    hostnames: list[str]


class DnsOption(Written):
    name: str
    value: str | None = None


class DnsConfig(Written):
    nameservers: list[str] | None = None
    searches: list[str] | None = None
    options: list[DnsOption] | None = None


class PullSecretRef(Written):
    """Kubernetes: name. UCloud: registryServer, username, password."""

    name: str | None = None
    registry_server: str | None = None
    username: str | None = None
    password: str | None = None


class PodSpec(Written):
    containers: list[WrittenContainer]
    init_containers: list[WrittenContainer] | None = None
    volumes: list[WrittenVolume] | None = None
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    termination_grace_period_seconds: int = 30
    active_deadline_seconds: int | None = None
    hostname: str | None = None
    subdomain: Ignored = None
    host_aliases: list[WrittenAlias] | None = None
    dns_policy: Literal["ClusterFirst", "Default", "None"] = "ClusterFirst"
    dns_config: DnsConfig | None = None
    image_pull_secrets: list[PullSecretRef] | None = None
    security_context: PodSecurityContext | None = None
    automount_service_account_token: Literal[False] | None = None
    enable_service_links: Ignored = None
    service_account_name: Literal["default"] | None = None
    service_account: Literal["default"] | None = None
    node_name: Ignored = None
    node_selector: Ignored = None
    affinity: Ignored = None
    tolerations: Ignored = None
    topology_spread_constraints: Ignored = None
    scheduler_name: Ignored = None
    priority: Ignored = None
    priority_class_name: Ignored = None
    preemption_policy: Ignored = None


class PodManifest(Written):
    api_version: Literal["v1"]
    kind: Literal["Pod"]
    metadata: Metadata
    spec: PodSpec
    status: Ignored = None


class ConfigMapManifest(Written):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: Texts | None = None
    binary_data: Texts | None = None
    immutable: Ignored = None


class SecretManifest(Written):
    api_version: Literal["v1"]
    kind: Literal["Secret"]
    metadata: Metadata
    type: str = "Opaque"
    data: Texts | None = None
    string_data: Texts | None = None
    immutable: Ignored = None


class ClaimSpec(Written):
    access_modes: list[str] | None = None
    resources: Resources | None = None
    volume_mode: Literal["Filesystem"] = "Filesystem"
    storage_class_name: Ignored = None


class ClaimManifest(Written):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec
    status: Ignored = None


class RollingUpdate(Written):
    max_surge: int | str | None = None
    max_unavailable: int | str | None = None


class Strategy(Written):
    type: Literal["RollingUpdate"] = "RollingUpdate"
    rolling_update: RollingUpdate | None = None


class Template(Written):
    metadata: Metadata | None = None
    spec: PodSpec


class Selector(Written):
    match_labels: Texts


class SetSpec(Written):
    replicas: int = 1
    selector: Selector | None = None
    template: Template | None = None
    cube_pod_spec: PodSpec | None = None  # UCloud's
    strategy: Strategy | None = None
    min_ready_seconds: Literal[0] | None = None
    revision_history_limit: Ignored = None
    progress_deadline_seconds: Ignored = None


class SetManifest(Written):
    api_version: Literal["apps/v1", "v1"]
    kind: Literal["Deployment", "ReplicaSet"]
    metadata: Metadata
    spec: SetSpec
    status: Ignored = None
