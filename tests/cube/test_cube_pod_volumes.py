"""Volumes of a pod on servers that nobody here wrote: nfs-ganesha, and rclone's S3."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.nfs_server import nfs_server
from kits.pods import PodHost, make_image, until
from kits.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, rclone_server, scratch_root

from cube.vm.bridge import start_bridge
from cube.vm.seam import FileDisk

HOST = "10.0.2.2"  # this host, seen from QEMU's user-mode network
POD = """\
apiVersion: v1
kind: Secret
metadata: {name: bucket}
stringData: {accessKey: ACCESS, secretKey: SECRET}
---
apiVersion: v1
kind: Pod
metadata: {name: far}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: IMAGE
    command:
    - sh
    - -c
    - |
      cat /nfs/there; echo by-guest > /nfs/new
      cat /s3/object; echo by-guest > /s3/new; sync
    volumeMounts:
    - {name: files, mountPath: /nfs}
    - {name: objects, mountPath: /s3}
  volumes:
  - {name: files, nfs: {address: "HOST:/export", mountOption: "port=NFSPORT"}}
  - name: objects
    s3: {endpoint: "http://HOST:S3PORT", bucket: BUCKET, secretRef: {name: bucket}}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodHost]:
    directory = tmp_path_factory.mktemp("far")
    host = PodHost(directory / "s", make_image(directory / "image"))
    yield host
    host.close()


@pytest.mark.soak
def test_files_and_objects_of_servers(host: PodHost, tmp_path: Path):
    with scratch_root() as root, rclone_server(root) as s3:
        shared = root / "shared"
        shared.mkdir()
        (shared / "there").write_text("from the host\n")
        (s3.directory / "object").write_text("from the bucket\n")
        with nfs_server(shared, tmp_path) as port:
            text = POD.replace("HOST", HOST).replace("NFSPORT", str(port))
            text = text.replace("S3PORT", s3.endpoint.rpartition(":")[2]).replace("BUCKET", BUCKET)
            text = text.replace("ACCESS", ACCESS_KEY).replace("SECRET", SECRET_KEY)
            host.call("run", host.manifest("far", text), "--timeout", "240", expect=None)
            until(
                "the pod to end",
                lambda: host.state_of("far")["phase"] in ("Succeeded", "Failed"),
            )
            status = host.state_of("far")
            assert status["state"] == "Completed", status
            assert host.call("logs", "far") == "from the host\nfrom the bucket\n"
            assert (shared / "new").read_text() == "by-guest\n"
            assert (s3.directory / "new").read_text() == "by-guest\n"
            assert SECRET_KEY not in str(status)
            host.call("delete", "far")


KEEPING = """\
apiVersion: v1
kind: Pod
metadata: {name: keeping}
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: IMAGE
    command: [sh, -c, "cat /data/there; echo by-guest > /data/new; sync"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes:
  - {name: data, udisk: {resourceName: kept}}
"""


@pytest.mark.soak
async def test_claim_on_another_processs_vhost_user_socket(host: PodHost, tmp_path: Path):
    """A block volume as SPDK would serve it: here qemu-storage-daemon does."""
    tree, disk = tmp_path / "tree", tmp_path / "disk.img"
    tree.mkdir()
    (tree / "there").write_text("from the server\n")
    with disk.open("wb") as file:
        file.truncate(8 << 20)
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(disk)]
    await asyncio.to_thread(subprocess.run, make, check=True, timeout=60)
    bridge = await start_bridge([FileDisk("kept", disk, read_only=False)], tmp_path)
    volumes = host.state / "volumes"
    volumes.mkdir(parents=True, exist_ok=True)
    (volumes / "kept.sock").symlink_to(bridge.sockets[0])

    def run() -> str:
        host.call("run", host.manifest("keeping", KEEPING), "--timeout", "240", expect=None)
        over = ("Succeeded", "Failed")
        until("the pod to end", lambda: host.state_of("keeping")["phase"] in over)
        said = host.call("logs", "keeping")
        host.call("delete", "keeping")
        return said

    assert await asyncio.to_thread(run) == "from the server\n"
    assert not (volumes / "kept.img").exists()
    await bridge.stop()
    show = ["debugfs", "-R", "cat new", str(disk)]
    shown = await asyncio.to_thread(subprocess.run, show, capture_output=True, timeout=60)
    assert shown.stdout == b"by-guest\n"
