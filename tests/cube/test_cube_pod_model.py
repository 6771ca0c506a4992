"""Manifests to the pod model: what is honoured, what is refused, and that its line is named."""

from __future__ import annotations

import base64
import textwrap

import pytest

from cube.pod.manifests import parse_manifests
from cube.pod.model import BlockVolume, EmptyVolume, FilesVolume, NfsVolume, ObjectVolume, Pod
from cube.pod.quantity import parse_cpu, parse_memory
from cube.pod.volumes import Policy
from cube.pod.yamltree import parse
from imagecache.errors import CubecacheError, Denied, LimitExceeded, Rejected, UsageError

pytestmark = pytest.mark.quick

HEAD = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n"


def pod(spec: str, before: str = "", policy: Policy | None = None) -> Pod:
    """The one pod of a spec written from line 5 on."""
    text = before + HEAD + textwrap.indent(textwrap.dedent(spec), "  ")
    (found,) = parse_manifests(text.encode(), policy).pods
    return found


def container(fields: str, more: str = "") -> Pod:
    """A pod with one container of these fields (flow style), and more of the spec."""
    return pod(f"containers: [{{name: a, image: b, {fields}}}]\n{more}")


def refused(text: str | bytes, kind: type[CubecacheError] = Rejected) -> str:
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(kind) as caught:
        parse_manifests(raw)
    return str(caught.value)


def test_a_whole_pod_is_normalised_and_survives_json():
    before = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: conf}
data: {a: text}
binaryData: {}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
data: {token: c2VjcmV0}
---
"""
    found = pod(
        """\
        restartPolicy: OnFailure
        nodeSelector: {disk: fast}
        securityContext: {runAsUser: 7, fsGroup: 9}
        initContainers: [{name: first, image: i}]
        containers:
        - name: main
          image: registry/x@sha256:0
          command: [run]
          env:
          - {name: A, valueFrom: {configMapKeyRef: {name: conf, key: a}}}
          - {name: T, valueFrom: {secretKeyRef: {name: keys, key: token}}}
          - {name: N, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
          - {name: O, valueFrom: {secretKeyRef: {name: none, key: x, optional: true}}}
          envFrom: [{prefix: C_, configMapRef: {name: conf, optional: false}}]
          ports: [{name: http, containerPort: 80, hostPort: 8080}]
          livenessProbe: {httpGet: {port: http}}
          resources: {limits: {cpu: 1500m, memory: 1Gi}}
          volumeMounts:
          - {name: conf, mountPath: /conf}
          - {name: data, mountPath: /data/, subPath: x}
          securityContext: {capabilities: {add: [NET_ADMIN], drop: [ALL]}}
        volumes:
        - {name: conf, configMap: {name: conf, items: [{key: a, path: d/a, mode: 0400}]}}
        - {name: data, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
        """,
        before,
    )
    main = found.containers[0]
    assert {one.name: one.value or one.field for one in main.environment} == {
        "C_a": "text",
        "A": "text",
        "T": "secret",
        "N": "metadata.name",
    }
    assert (main.cpu_millis, main.memory_bytes) == (1500, 1 << 30)
    assert main.liveness is not None and main.liveness.check.port == 80
    assert [mount.path for mount in main.mounts] == ["/conf", "/data"]
    assert main.mounts[0].read_only and not main.mounts[1].read_only
    assert main.security.user == "7" and main.security.groups == (9,)
    files, empty = found.volumes
    assert isinstance(files, FilesVolume) and files.files[0].mode == 0o400
    assert isinstance(empty, EmptyVolume) and empty.memory and empty.size_bytes == 64 << 20
    assert Pod.model_validate_json(found.model_dump_json()) == found


def test_the_dialect_is_normalised_to_the_same_model():
    secret = base64.b64encode(b"pw").decode()
    found = pod(
        f"""\
        containers:
        - {{name: a, image: b, volumeMounts: [{{name: d, mountPath: /d}}]}}
        imagePullSecrets: [{{registryServer: r.example, username: u, password: p}}]
        volumes:
        - {{name: c, configMap: {{nginx.conf: "listen 80;", name: is a key here}}}}
        - {{name: s, secret: {{token: {secret}}}}}
        - {{name: n, nfs: {{address: "10.0.0.5:/share", mountOption: "vers=4.1"}}}}
        - {{name: d, udisk: {{resourceName: disk-1, fs: ext4, forceFormat: true}}}}
        """
    )
    config, keys, nfs, disk = found.volumes
    assert isinstance(config, FilesVolume) and isinstance(keys, FilesVolume)
    assert {file.path for file in config.files} == {"nginx.conf", "name"}
    assert keys.files[0].content == b"pw"
    assert isinstance(nfs, NfsVolume) and (nfs.server, nfs.path) == ("10.0.0.5", "/share")
    assert isinstance(disk, BlockVolume) and disk.claim == "disk-1" and disk.format
    assert found.pull_secrets[0].password == "p"
    assert "p" not in repr(found.pull_secrets[0]).split("password")


def test_a_set_has_a_template_of_either_kind():
    text = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: front}
spec:
  replicas: 8
  cubePodSpec: {containers: [{name: a, image: b}]}
  strategy: {rollingUpdate: {maxSurge: 25%, maxUnavailable: 1}}
"""
    (found,) = parse_manifests(text.encode()).sets
    assert (found.replicas, found.max_surge, found.max_unavailable) == (8, 2, 1)
    assert found.template.labels == {"cubecache/set": "front"}


def test_claims_and_buckets():
    before = """\
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: disk}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 3Gi}}}
---
apiVersion: v1
kind: Secret
metadata: {name: s3}
stringData: {accessKey: ak, secretKey: sk}
---
"""
    found = pod(
        """\
        containers: [{name: a, image: b}]
        volumes:
        - {name: d, persistentVolumeClaim: {claimName: disk}}
        - {name: o, s3: {endpoint: "http://s", bucket: b, secretRef: {name: s3}}}
        """,
        before,
    )
    disk, bucket = found.volumes
    assert isinstance(disk, BlockVolume) and disk.size_bytes == 3 << 30
    assert isinstance(bucket, ObjectVolume) and bucket.secret_key == "sk"
    assert "sk" not in repr(bucket)


def bomb() -> bytes:
    lines = [b"a: &a [1,1,1,1,1,1,1,1,1]"]
    for index in range(9):
        now, last = bytes([98 + index]), bytes([97 + index])
        lines.append(now + b": &" + now + b" [" + b",".join([b"*" + last] * 9) + b"]")
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("raw", "kind", "said"),
    [
        (bomb(), LimitExceeded, "once aliases are expanded"),
        (b"a: " + b"x" * (5 << 20), LimitExceeded, "over the limit"),
        (b"a: !!python/object/apply:os.system [id]", Rejected, "line 1: tag"),
        (b"a: 1\n\tb: 2", Rejected, "line 2: this is not YAML"),
        (b"a: 1\nb: 2\na: 3", Rejected, "line 3: 'a' stands twice"),
        (b"[" * 5000, LimitExceeded, "nested deeper"),
        (b"\xff\xfe", Rejected, "not UTF-8"),
        (b"on: 1", Rejected, "the key 'on' is not text"),
        (b"a: {<<: {b: 1}}", Rejected, "merge keys"),
        (b"a: *b", Rejected, "no anchor"),
        (b"- a", Rejected, "must be a mapping"),
        (b"", Rejected, "no Pod"),
        (b"---\n" * 600 + b"a: 1", LimitExceeded, "documents"),
    ],
)
def test_hostile_yaml_is_refused(raw, kind, said):
    """J1: bombs, sizes, tags, tabs, duplicates, depth: a typed error with the line."""
    assert said in refused(raw, kind)


def test_marks_and_line_ends_of_other_systems_are_read():
    """J1: BOM, CRLF, several documents."""
    raw = b"\xef\xbb\xbf" + (HEAD + "  containers: [{name: a, image: b}]\n").encode()
    raw = (raw + b"---\n" + raw[3:].replace(b"web", b"two")).replace(b"\n", b"\r\n")
    assert [one.name for one in parse_manifests(raw).pods] == ["web", "two"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("image: 3.10", "spec.containers[0].image must be text, not a fraction; quote it"),
        ("image: b, command: [sh, on]", "command[1] must be text, not a boolean; quote it"),
        ("image: b, args: [2024-01-01]", "args[0] must be text, not a date; quote it"),
        ("image: ~", "image must be text, not nothing"),
        ("image: b, env: [{name: A, value: 1}]", "env[0].value must be text, not a whole number"),
        ("image: b, tty: 'yes'", "tty must be true or false, not text"),
        ("image: b, ports: [{containerPort: 0o12}]", "containerPort must be a whole number"),
        ("image: b, foo: 1", "spec.containers[0].foo is not supported"),
        ("imagePullPolicy: Always", "spec.containers[0] has no image"),
        ("image: b, imagePullPolicy: Sometimes", "imagePullPolicy is 'Sometimes'"),
    ],
)
def test_wrong_types_name_field_and_line(fields, said):
    """J2, J3, J8: floats, booleans, dates, nulls, unknown fields, unknown policies."""
    text = f"{HEAD}  containers:\n  - {{name: a, {fields}}}\n"
    told = refused(text)
    assert said in told and told.startswith("line 6: Pod web: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apiVersion: v1\nkind: Job\n", "kind 'Job' is not supported"),
        ("apiVersion: v2\nkind: Pod\n", "line 1: apiVersion 'v2' is not supported for Pod"),
        ("apiVersion: v1\nkind: [Pod]\n", "is not supported"),
        (HEAD + "  containers: []\n", "line 5: Pod web: spec.containers is empty"),
        (HEAD + "  hostPID: true\n  containers: []\n", "spec.hostPID is not supported"),
    ],
)
def test_unknown_kinds_and_empty_pods_are_refused(text, said):
    """J3."""
    assert said in refused(text)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", Denied),
        ("/etc", Denied),
        ("/srv/share/../../etc", Rejected),
        ("relative", Rejected),
        ("/var/run/docker.sock", Denied),
        ("/srv/shared", Denied),
    ],
)
def test_host_paths_are_the_operators_to_allow(path, kind):
    """J4: outside of the allowed directories, `..`, sockets, relative ones."""
    spec = (
        f"containers: [{{name: a, image: b}}]\nvolumes: [{{name: v, hostPath: {{path: {path}}}}}]"
    )
    with pytest.raises(kind, match=r"line 6: Pod web: spec.volumes\[0\].hostPath.path"):
        pod(spec, policy=Policy(("/srv/share",)))
    allowed = spec.replace(path, "/srv/share/x")
    assert pod(allowed, policy=Policy(("/srv/share",))).volumes[0].name == "v"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("containers: [{name: a, image: b}, {name: a, image: b}]", "names two containers"),
        (
            "containers: [{name: a, image: b}]\nvolumes: [{name: v, emptyDir: {}}, "
            "{name: v, emptyDir: {}}]",
            "names two volumes",
        ),
        (
            "containers: [{name: a, image: b, volumeMounts: [{name: v, mountPath: /x}, "
            "{name: v, mountPath: /x/}]}]\nvolumes: [{name: v, emptyDir: {}}]",
            "mounted twice",
        ),
        (
            "containers: [{name: a, image: b, volumeMounts: [{name: v, mountPath: /x}]}]",
            "not among the pod's volumes",
        ),
        (
            "containers: [{name: a, image: b}]\nvolumes: [{name: v, emptyDir: {}, "
            "nfs: {server: s, path: /p}}]",
            "exactly one source",
        ),
        (
            "containers: [{name: a, image: b}]\nvolumes: [{name: v, udisk: {id: d}}, "
            "{name: w, udisk: {id: d}}]",
            "a second time",
        ),
        (
            "containers: [{name: a, image: b, ports: [{containerPort: 1, hostPort: 9}, "
            "{containerPort: 2, hostPort: 9}]}]",
            "hostPort twice",
        ),
    ],
)
def test_what_stands_twice_is_refused(spec, said):
    """J5."""
    with pytest.raises(Rejected, match=said):
        pod(spec)


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ('env: [{name: A, value: "a\\0b"}]', Rejected, "NUL"),
        ('env: [{name: "A\\nB", value: x}]', Rejected, "no name of a variable"),
        (f"env: [{{name: A, value: {'x' * (1 << 20)}}}]", LimitExceeded, "more than 131071 bytes"),
        (f"args: [{', '.join(['x'] * 10_000)}]", LimitExceeded, "10000 words, over 4096"),
        ("workingDir: etc", Rejected, "not an absolute path"),
    ],
)
def test_hostile_variables_and_arguments_are_refused(fields, kind, said):
    """J6."""
    with pytest.raises(kind, match=said):
        container(fields)


@pytest.mark.parametrize("name", ["Web", "-a", "a_b", "", "a" * 64, "a/b", "a b"])
def test_names_are_dns_labels(name):
    """J6: names that are not DNS-1123."""
    with pytest.raises(Rejected):
        pod(f"containers: [{{name: {name!r}, image: b}}]")


@pytest.mark.parametrize(
    "limits",
    ["memory: -1", "memory: 1e30Gi", "memory: 100m", "cpu: -1", "cpu: 1Gi", "cpu: lots",
     "memory: 2000Pi", "cpu: 1e9", "gpu: 1", "memory: 1.5"],
)  # fmt: skip
def test_absurd_amounts_are_refused(limits):
    """J7."""
    with pytest.raises(Rejected, match=r"spec.containers\[0\].resources.limits"):
        container(f"resources: {{limits: {{{limits}}}}}")


def test_amounts():
    assert parse_memory("1.5Gi") == 3 << 29
    assert parse_memory(7) == 7
    assert parse_memory("1e3") == 1000
    assert parse_cpu("250m") == 250
    assert parse_cpu(0.5) == 500
    assert parse_cpu("0.0001") == 1
    for bad in ("", "m", "1 Gi", "0x10", "\u0661"):
        with pytest.raises(UsageError):
            parse_memory(bad)


def test_pull_secrets_are_checked_and_never_shown():
    """J8: missing, or of a wrong type: a message of its own, without the secret."""
    spec = "containers: [{name: a, image: b}]\nimagePullSecrets: [{name: regcred}]"
    with pytest.raises(Rejected, match="names Secret 'regcred', which is not in this file"):
        pod(spec)
    secret = (
        "apiVersion: v1\nkind: Secret\nmetadata: {name: regcred}\ntype: Opaque\n"
        "stringData: {password: hunter2}\n---\n"
    )
    with pytest.raises(Rejected, match="of type 'Opaque'") as caught:
        pod(spec, secret)
    assert "hunter2" not in str(caught.value)
    broken = secret.replace("Opaque", "kubernetes.io/dockerconfigjson").replace(
        "password: hunter2", ".dockerconfigjson: hunter2"
    )
    with pytest.raises(Rejected, match="not a Docker configuration") as caught:
        pod(spec, broken)
    assert "hunter2" not in str(caught.value)


def test_every_value_has_a_line():
    (document,) = parse(b"a:\n  - b: 1\n    c:\n      - x\n      - y\n")
    assert document.line(("a", 0, "c", 1)) == 5
    assert document.line(("a", 0, "missing")) == 2
