"""One real microVM with a network: its address, NFS and S3 volumes, and servers that fail."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from kits.nfs_server import nfs_server
from kits.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, rclone_server, scratch_root

from cube.channel.messages import ExecSpec
from cube.configdisk import GuestConfig
from cube.container import ContainerSpec
from cube.guest.assets import ensure_guest, ensure_tools
from cube.link import GuestLink
from cube.sandbox import SandboxSpec, boot
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from cube.vm.seam import MIB, FileDisk, MachineSpec, NbdDisk, UserNic
from cube.volumes import Interface, Mount, Volume, VolumeKind

SECONDS = 120.0
MAC = "52:54:00:12:34:56"
HOST = "10.0.2.2"  # this host's loopback, as a machine with a UserNic sees it


class Networked(QemuDriver):
    """Gives every machine a network card, and names its disks by their order."""

    async def start(self, spec: MachineSpec):
        names = ",".join(disk.serial for disk in spec.disks)
        words = (f"cube.disks={names}",)
        changed = dataclasses.replace(spec, nics=(UserNic(MAC),), kernel_arguments=words)
        return await super().start(changed)


@pytest.fixture
def servers(tmp_path: Path):
    """Ports of an NFS and an S3 server, and the directories they serve."""
    with scratch_root() as root, rclone_server(root) as s3:
        shared, scratch = root / "shared", tmp_path / "nfs"
        shared.mkdir()
        scratch.mkdir()
        (shared / "there").write_text("from the host\n")
        (s3.directory / "object").write_text("from the bucket\n")
        with nfs_server(shared, scratch) as port:
            yield port, int(s3.endpoint.rpartition(":")[2]), shared, s3.directory


async def words(link: GuestLink, script: str) -> str:
    process = link.execute(ExecSpec(1, ("sh", "-c", script)))
    parts = []
    async with asyncio.timeout(SECONDS):
        while piece := await process.stdout.read():
            parts.append(piece)
    assert (await process.wait(seconds=SECONDS)).code == 0, b"".join(parts)
    return b"".join(parts).decode()


async def test_network_and_remote_volumes(root_export, guest_cache, servers):
    nfs_port, s3_port, shared, bucket = servers
    volumes = (
        Volume("nfs", VolumeKind.NFS, source=f"{HOST}:/export", options=f"port={nfs_port},noatime"),
        Volume(
            "s3",
            VolumeKind.S3,
            source=BUCKET,
            options=f"url=http://{HOST}:{s3_port},use_path_request_style,umask=0022",
            secret=f"{ACCESS_KEY}:{SECRET_KEY}".encode(),
        ),
        Volume("gone", VolumeKind.NFS, source=f"{HOST}:/export", options="port=1,retry=0"),
        Volume("nokey", VolumeKind.S3, source="nobucket", options=f"url=http://{HOST}:{s3_port}",
               secret=b"a:b"),
    )  # fmt: skip
    main = ContainerSpec(
        ("sh", "-c", "echo up; while true; do sleep 1; done"), ("PATH=/bin",), "", "/",
        autostart=False, mounts=(Mount("nfs", "/nfs"), Mount("s3", "/s3")),
    )  # fmt: skip
    others = tuple(
        ContainerSpec(
            ("true",), ("PATH=/bin",), "", "/", id=number, name=name, autostart=False,
            root_disk="root-1", mounts=(Mount(name, "/x"),),
        )
        for number, name in ((2, "gone"), (3, "nokey"))
    )  # fmt: skip
    config = GuestConfig(
        (main, *others), hostname="net", volumes=volumes, modules=("net", "nfs", "fuse"),
        interfaces=(
            Interface(MAC, addresses=("10.0.2.15/24", "fd00::2/64"), gateway=HOST, mtu=1400),
        ),
        tools_disk="cube-tools",
    )  # fmt: skip
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    tools = await asyncio.to_thread(ensure_tools, guest_cache)
    disks = (
        NbdDisk("root-1", root_export.socket, root_export.export),
        FileDisk("cube-tools", tools),
    )
    driver = Networked(await choose_platform(guest_cache, files))
    async with boot(driver, files, SandboxSpec("net", config, disks, 320 * MIB, 1)) as sandbox:
        await sandbox.booted()
        link = sandbox.link
        process = link.start(1)
        gone, nokey = link.start(2), link.start(3)
        async with asyncio.timeout(SECONDS):
            problem = ""
            if not await process.stdout.read():
                problem = (await process.wait(seconds=SECONDS)).problem
        assert not problem
        seen = await words(link, "ip addr show eth0; ip route; ip -6 addr show eth0")
        assert "10.0.2.15/24" in seen
        assert "mtu 1400" in seen
        assert f"default via {HOST}" in seen
        assert "fd00::2/64" in seen
        assert await words(link, "cat /nfs/there; echo by-guest > /nfs/new") == "from the host\n"
        assert (shared / "new").read_text() == "by-guest\n"
        assert await words(link, "cat /s3/object; echo by-guest > /s3/new; sync") == (
            "from the bucket\n"
        )
        assert (bucket / "new").read_text() == "by-guest\n"
        ended = await gone.wait(seconds=SECONDS)
        assert ended.code == 125
        assert "volume gone: cannot mount" in ended.problem
        ended = await nokey.wait(seconds=SECONDS)
        assert ended.code == 125
        assert "s3fs cannot mount nobucket" in ended.problem
        assert (await link.stats(seconds=SECONDS)).received_bytes > 0
