"""Which driver starts a pod's machine: named by flag, setting, manifest or program, or refused."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from kits.pods import CUBECACHE, PodHost, make_image

from cube.container import ImageDefaults
from cube.keeper.disks import claim_socket
from cube.keeper.guestplan import Facts, Image, plan_machine
from cube.keeper.orphans import machines
from cube.keeper.placing import check_firecracker_pod
from cube.orchestrator import Cube
from cube.pod.manifests import parse_manifests
from imagecache.errors import Rejected, Unsupported, UsageError

POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web, annotations: {cubecache/driver: DRIVER}}
spec:
  containers: [{name: main, image: IMAGE, resources: {limits: {memory: 64Mi}}}]
"""


def test_firecracker_is_refused_by_name_where_it_cannot_work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("driver")  # a short name: sockets lie below it
    host = PodHost(directory / "s", make_image(directory / "image"))
    path = host.manifest("web", POD.replace("DRIVER", "qemu").replace(", annotations", ", labels"))
    environment = {**host.environment, "CUBECACHE_FIRECRACKER": "/nowhere/firecracker"}
    try:
        done = subprocess.run(
            [str(CUBECACHE), "pod", "run", "--driver", "firecracker", path],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode != 0
        assert "this host has no Firecracker (/nowhere/firecracker)" in done.stderr
        assert "--driver qemu" in done.stderr
        assert host.json("list")["pods"] == []
    finally:
        host.close()


@pytest.mark.quick
def test_driver_of_manifest_program_and_environment(tmp_path, monkeypatch):
    pod = parse_manifests(POD.replace("DRIVER", "firecracker").encode()).pods[0]
    assert pod.driver == "firecracker"
    with pytest.raises(Rejected, match=r"line 3: .*is 'xen'; it can be qemu, firecracker"):
        parse_manifests(POD.replace("DRIVER", "xen").encode())
    with pytest.raises(UsageError, match="no driver 'xen'"):
        Cube(state_dir=tmp_path, driver="xen")
    monkeypatch.setenv("CUBECACHE_POD_DRIVER", "vmware")
    with pytest.raises(UsageError, match="no driver 'vmware'"):
        Cube(state_dir=tmp_path)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("ports: [{containerPort: 80, hostPort: 8080}]", "container main: hostPort 8080"),
        ("volumeMounts: [{name: n, mountPath: /n}]", "volume n"),
    ],
)
def test_what_needs_a_network_is_refused_for_firecracker(change, named):
    text = POD.replace("image: IMAGE", f"image: IMAGE, {change}").replace("DRIVER", "firecracker")
    text += "  volumes: [{name: n, nfs: {server: 10.0.0.1, path: /}}]\n" * ("Mounts" in change)
    pod = parse_manifests(text.encode()).pods[0]
    with pytest.raises(Unsupported, match=f"{named} needs a network"):
        check_firecracker_pod(pod)


@pytest.mark.quick
def test_machine_without_a_card_has_no_interface():
    pod = parse_manifests(POD.replace("DRIVER", "firecracker").encode()).pods[0]
    check_firecracker_pod(pod)
    images = {"main": Image(ImageDefaults(command=("sh",)), "erofs")}
    facts = Facts("0" * 12, "127.0.1.1", "", "host", "")
    assert plan_machine(pod, images, facts, sync_key=bytes(16)).config.interfaces == ()
    with_card = replace(facts, mac="02:00:00:00:00:01", address="10.0.2.15")
    assert len(plan_machine(pod, images, with_card, sync_key=bytes(16)).config.interfaces) == 1


def test_claim_that_another_process_serves_is_taken_over_its_socket(tmp_path):
    (tmp_path / "volumes").mkdir()
    assert claim_socket(tmp_path, "data") is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "volumes/data.sock"))
        assert claim_socket(tmp_path, "data") == tmp_path / "volumes/data.sock"


def test_firecracker_left_behind_is_reported(tmp_path):
    directory = tmp_path / "0123456789ab"
    directory.mkdir()
    program = tmp_path / "firecracker"
    program.symlink_to("/bin/busybox")
    process = subprocess.Popen(
        ["sleep", "300"], executable=program, cwd=directory, env={**os.environ}
    )
    try:
        assert machines(tmp_path) == [(process.pid, Path(directory).name)]
    finally:
        process.kill()
        process.wait(timeout=60)
