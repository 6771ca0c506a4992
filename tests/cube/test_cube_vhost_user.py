"""Disks over vhost-user: qemu-storage-daemon's words, and a real machine that reads and writes."""

from __future__ import annotations

import asyncio
import gzip
import json
import lzma
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from kits.until import soon
from kits.vm_image import NbdServer, make_erofs, make_tree

from cube.container import ImageDefaults, Overrides, compose
from cube.errors import BootFailed
from cube.guest.assets import ensure_guest
from cube.run import guest_config
from cube.sandbox import SandboxSpec, boot
from cube.vm.bridge import bridge_command, end_left_behind, left_behind, start_bridge
from cube.vm.firecracker_host import choose_firecracker, find_firecracker, find_jailer
from cube.vm.kernel_image import elf_kernel, unpack_kernel
from cube.vm.lz4 import MAGIC, unpack_legacy
from cube.vm.platform import choose_platform, kvm_may_work
from cube.vm.qemu import QemuDriver
from cube.vm.qemu_command import Platform, check_spec, command
from cube.vm.seam import MIB, FileDisk, MachineSpec, NbdDisk, Rates, VhostUserDisk
from cube.volumes import Mount, Volume, VolumeKind
from imagecache.errors import Rejected, Unsupported, UsageError

SCRIPT = (
    "echo $(cat /sys/block/vdb/serial); cat /etc/image-release /v/kept; echo new > /v/kept; sync"
)


def make_volume(path: Path) -> Path:
    """An ext4 disk with one file."""
    tree = path.with_suffix(".d")
    tree.mkdir()
    (tree / "kept").write_text("old\n")
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(path)], check=True, timeout=60
    )
    return path


async def test_machine_boots_from_nbd_and_writes_a_volume_over_vhost_user(tmp_path, guest_cache):
    """A root over NBD and a block volume, both served by qemu-storage-daemon (SPDK's stand-in)."""
    root = NbdServer(make_erofs(make_tree(tmp_path / "tree"), tmp_path / "r.erofs"), tmp_path / "s")
    volume = make_volume(tmp_path / "v.img")
    served = [NbdDisk("root-1", root.socket, ""), FileDisk("vol-1", volume, read_only=False)]
    bridge = await soon(start_bridge(served, tmp_path, rates=Rates(disk_bytes=64 * MIB)))
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    container = replace(
        compose(ImageDefaults(command=("sh", "-c", SCRIPT)), Overrides(), hostname="vu"),
        mounts=(Mount("data", "/v"),),
    )
    config = replace(
        guest_config(container, "erofs", "vu"),
        volumes=(Volume("data", VolumeKind.DISK, disk="vol-1"),),
    )
    disks = tuple(
        VhostUserDisk(disk.serial, path, disk.read_only)
        for disk, path in zip(served, bridge.sockets, strict=True)
    )
    driver = QemuDriver(await choose_platform(guest_cache, files))
    spec = SandboxSpec("vu", config, disks, 256 * MIB, 1)
    said = b""
    async with boot(driver, files, spec) as sandbox:
        process = sandbox.link.processes[container.id]
        await sandbox.booted()
        while received := await soon(process.stdout.read(), 180):
            said += received
        assert (await sandbox.exit_of(process, seconds=180)).code == 0
    await soon(bridge.stop())
    root.stop()
    assert said == b"vhost_user_blk\nmade for tests\nold\n"
    shown = subprocess.run(
        ["debugfs", "-R", "cat kept", str(volume)], capture_output=True, check=True, timeout=60
    )
    assert shown.stdout == b"new\n"
    assert [*tmp_path.glob("*.sock")] == []


@pytest.mark.quick
def test_words_of_the_storage_daemon():
    disks = (NbdDisk("root-1", Path("/n"), "e"), FileDisk("v", Path("/f"), read_only=False))
    words = bridge_command(Path("qsd"), disks, Rates(disk_bytes=5))
    assert words[1] == "--object"
    node = json.loads(words[words.index("--blockdev") + 1])
    assert (node["driver"], node["file"]["driver"]) == ("throttle", "nbd")
    assert node["file"]["reconnect-delay"] == 60
    exports = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "--export"]
    assert [one["writable"] for one in exports] == [False, True]
    assert exports[1]["addr"] == {"type": "unix", "path": "vu-1.sock"}
    assert "throttle" not in str(bridge_command(Path("qsd"), disks))


@pytest.mark.quick
def test_qemu_shares_memory_and_names_disks_by_order_with_vhost_user():
    disks = (FileDisk("cube-config", Path("/c")), VhostUserDisk("root-1", Path("/a,b")))
    spec = MachineSpec("x", Path("/k"), Path("/i"), disks, Path("/d"))
    words = command(Platform(Path("q"), "microvm", "tcg"), spec, channel_fd=3, console_fd=4)
    assert "memory-backend-memfd,id=memory,size=256M,share=on" in words
    assert "virtio-mmio.force-legacy=false" in words
    assert "socket,id=disk1,path=/a,,b,reconnect=1" in words
    assert "cube.disks=cube-config,root-1" in words[words.index("-append") + 1]
    pci = command(Platform(Path("q"), "q35", "tcg"), spec, channel_fd=3, console_fd=4)
    assert "virtio-mmio.force-legacy=false" not in pci
    assert json.loads(pci[-1])["driver"] == "vhost-user-blk-pci"
    alone = command(
        Platform(Path("q"), "microvm", "tcg"),
        replace(spec, disks=disks[:1]),
        channel_fd=3,
        console_fd=4,
    )
    assert "memory-backend" not in str(alone)
    assert "cube.disks" not in str(alone)
    with pytest.raises(Unsupported, match="rate of network cards"):
        check_spec(
            Platform(Path("q"), "microvm", "tcg"), replace(spec, rates=Rates(network_bytes=1))
        )


async def test_bridge_tells_why_it_ends_and_is_found_again(tmp_path):
    with pytest.raises(BootFailed, match=r"absent\.img"):
        await soon(start_bridge([FileDisk("a", tmp_path / "absent.img")], tmp_path))
    (tmp_path / "a.img").write_bytes(bytes(4096))
    disks = [FileDisk("a", tmp_path / "a.img")]
    bridge = await soon(start_bridge(disks, tmp_path, dies_with_owner=False))
    assert left_behind(tmp_path) == bridge.process_id
    end_left_behind(tmp_path)
    assert await soon(bridge.wait()) == -9
    await soon(bridge.stop())
    assert [path.name for path in tmp_path.iterdir()] == ["a.img"]
    for record in ("", "[]", '{"process": 1}', '{"process": 1, "started": 0}'):
        (tmp_path / "bridge.json").write_text(record)
        assert left_behind(tmp_path) == 0


def bzimage(packed: bytes, version: int = 0x020F) -> bytes:
    """A bzImage as far as its header says where the packed kernel is."""
    head = bytearray(5 * 512)
    head[0x1F1] = 4
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 16, len(packed))
    return bytes(head) + bytes(16) + packed


@pytest.mark.quick
def test_kernels_are_unpacked_for_firecracker(tmp_path):
    elf = b"\x7fELF" + bytes(range(256)) * 50
    for packed in (
        lzma.compress(elf) + b"size",
        gzip.compress(elf),
        zstandard.compress(elf),
    ):
        assert unpack_kernel(bzimage(packed)) == elf
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(gzip.compress(elf)))
    unpacked = elf_kernel(kernel, tmp_path / "cache")
    assert unpacked.read_bytes() == elf
    assert elf_kernel(kernel, tmp_path / "cache") == unpacked
    assert elf_kernel(unpacked, tmp_path) == unpacked
    for wrong, why in (
        (b"MZ", "neither"),
        (bzimage(lzma.compress(elf), 0x0207), "older than 2.08"),
        (bzimage(b"BZh9"), "by neither xz, gzip, lz4 nor zstd"),
        (bzimage(b"\x28\xb5\x2f\xfdxxxxxxxx"), "cannot be unpacked"),
        (bzimage(MAGIC + b"\x09\0\0\0\x10aaa\0\0\0\0"), "cut off"),
        (bzimage(MAGIC + b"\x04\0\0\0\x10a\x09\0size"), "out of range"),
        (bzimage(lzma.compress(elf)[:-9] + b"123456789"), "unpacked"),
        (bzimage(gzip.compress(b"text")), "no ELF file"),
    ):
        with pytest.raises(Unsupported, match=why):
            unpack_kernel(wrong)


@pytest.mark.quick
def test_lz4_frames_of_kernels():
    """Sequences by hand: literals, an overlapping match, a long count, a second block."""
    first = b"\x26ab\x02\x00" + b"\x1fc\x01\x00\xff\x01" + b"\x10d"
    blocks = b"".join(struct.pack("<I", len(one)) + one for one in (first, b"\x30xyz"))
    wanted = b"ab" * 6 + b"c" * (1 + 19 + 255 + 1) + b"dxyz"
    assert unpack_legacy(MAGIC + blocks + b"size", 1000) == wanted
    with pytest.raises(Rejected, match="over 10 bytes"):
        unpack_legacy(MAGIC + blocks + b"size", 10)


async def test_kernel_that_guests_boot_can_be_given_to_firecracker(tmp_path, guest_cache):
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    kernel = await asyncio.to_thread(elf_kernel, files.kernel, tmp_path)
    content = kernel.read_bytes()
    assert content[:5] == b"\x7fELF\x02"  # 64 bits
    assert b"Linux version " + files.release.encode() in content


@pytest.mark.quick
def test_program_and_jailer_are_found_or_named(tmp_path):
    with pytest.raises(Unsupported, match="no Firecracker") as refused:
        find_firecracker({"PATH": str(tmp_path)})
    assert "--driver qemu" in str(refused.value.remedy)
    program = tmp_path / "firecracker"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_firecracker({"CUBECACHE_FIRECRACKER": str(program)}) == program
    assert find_jailer({}, program) is None
    with pytest.raises(Unsupported, match=r"no .*/jailer"):
        find_jailer({"CUBECACHE_JAILER": "99:99"}, program)
    (tmp_path / "jailer").write_text("")
    words = {
        "CUBECACHE_JAILER": "99:98:/srv/j",
        "CUBECACHE_JAILER_CGROUPS": "cpu.max=1 memory.max=2",
    }
    made = find_jailer(words, program)
    assert made is not None
    assert (made.uid, made.gid, made.chroot_base) == (99, 98, Path("/srv/j"))
    assert made.cgroups == {"cpu.max": "1", "memory.max": "2"}
    for wrong in (
        {"CUBECACHE_JAILER": "root"},
        {"CUBECACHE_JAILER": "0:0"},
        {**words, "CUBECACHE_JAILER_CGROUPS": "x"},
    ):
        with pytest.raises(UsageError):
            find_jailer(wrong, program)


async def test_real_firecracker_boots_or_the_host_is_told_why_not(tmp_path, guest_cache):
    """With a Firecracker in the PATH and a KVM that boots: a machine. Without: the reason."""
    files = await asyncio.to_thread(ensure_guest, guest_cache)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    try:
        program = find_firecracker(environment)
    except Unsupported as error:
        assert "this host has no Firecracker" in error.message
        program = tmp_path / "firecracker"
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
        with pytest.raises(Unsupported, match=r"KVM|boots no machine on this host"):
            await soon(choose_firecracker(tmp_path, files, {"CUBECACHE_FIRECRACKER": str(program)}))
        return
    if not kvm_may_work():
        with pytest.raises(Unsupported, match="needs KVM"):
            await soon(choose_firecracker(tmp_path, files, environment))
        return
    try:
        driver = await soon(choose_firecracker(tmp_path, files, environment))
    except Unsupported as error:
        assert "boots no machine on this host" in error.message
        return
    config = guest_config(
        compose(ImageDefaults(command=("cat", "/etc/image-release")), Overrides(), hostname="f"),
        "erofs",
        "f",
    )
    root = NbdServer(make_erofs(make_tree(tmp_path / "tree"), tmp_path / "r.erofs"), tmp_path / "s")
    spec = SandboxSpec("f", config, (NbdDisk("root-1", root.socket, ""),), 256 * MIB, 1)
    async with boot(driver, files, spec) as sandbox:
        process = sandbox.link.processes[config.containers[0].id]
        assert (await sandbox.exit_of(process, seconds=120)).code == 0
        assert await soon(process.stdout.read()) == b"made for tests\n"
    root.stop()
