"""Pure parts: frames, records, container rules, QEMU's command line, cpio, modules."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cube.configdisk import GuestConfig, encode_config
from cube.container import ContainerSpec, ImageDefaults, Overrides, compose, parse_environment
from cube.frames import Decoder, FrameType, encode
from cube.guest import cpio
from cube.guest.assets import default_cache, kernel_release
from cube.guest.modules import dependencies, read_module, select_modules
from cube.guest.packages import packages_for_host
from cube.records import field, fields, numbers, printable, text, words
from cube.vm.qemu_command import Platform, check_spec, command, kernel_command_line, kvm_flags
from cube.vm.seam import MIB, FileDisk, MachineSpec, NbdDisk
from cube.vm.tail import Tail
from imagecache.errors import LimitExceeded, Rejected, Unsupported, UsageError

pytestmark = pytest.mark.quick

MICROVM = Platform(Path("/usr/bin/qemu-system-x86_64"), "microvm", "tcg")
Q35 = Platform(Path("/usr/bin/qemu-system-x86_64"), "q35", "kvm")


@given(payloads=st.lists(st.binary(max_size=200), max_size=8), cut=st.integers(1, 50))
def test_frames_survive_any_cutting(payloads, cut):
    stream = b"".join(
        encode(FrameType.DATA, stream=1, process=index, payload=payload)
        for index, payload in enumerate(payloads)
    )
    decoder = Decoder()
    got = [
        frame for at in range(0, len(stream), cut) for frame in decoder.feed(stream[at : at + cut])
    ]
    assert [(frame.process, frame.payload) for frame in got] == list(enumerate(payloads))


def test_frame_over_the_limit_is_rejected_before_its_payload():
    with pytest.raises(Rejected, match="65537"):
        Decoder().feed((65537).to_bytes(4, "little") + bytes(8))


@given(st.binary(max_size=200))
def test_records_never_fail_otherwise_than_by_rejection(raw):
    try:
        for key, value in fields(raw):
            assert isinstance(key, int) and isinstance(value, bytes)
        numbers(raw)
        words(raw)
    except Rejected:
        pass


def test_guest_text_cannot_drive_the_terminal():
    assert printable(b"ok\x1b[2J\x07\xff\n") == "ok\\x1b[2J\\x07\N{REPLACEMENT CHARACTER}\n"
    tail = Tail()
    tail.feed(b"x" * 20000 + b"\r\nlast \x1b]0;t\x07\n")
    assert tail.lines()[-1] == "last \\x1b]0;t\\x07"
    assert sum(map(len, tail.lines())) <= 17000


IMAGE = ImageDefaults(("/entry",), ("cmd", "arg"), ("A=image", "B=b", "odd"), "app", "/work")


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        (Overrides(), ("/entry", "cmd", "arg")),
        (Overrides(command=("mine",)), ("/entry", "mine")),
        (Overrides(entrypoint=("other",)), ("other",)),
        (Overrides(entrypoint=("other",), command=("x",)), ("other", "x")),
        (Overrides(entrypoint=("",), command=("x",)), ("x",)),
    ],
)
def test_commands_are_composed_as_docker_does(overrides, arguments):
    container = compose(IMAGE, overrides, hostname="h")
    assert container.arguments == arguments
    assert (container.user, container.working_directory) == ("app", "/work")


def test_environment_is_overridden_one_by_one():
    overrides = Overrides(environment={"A": "caller", "NEW": ""}, user="", working_directory="x")
    container = compose(IMAGE, overrides, hostname="box")
    assert container.environment == (
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=box", "A=caller", "B=b", "NEW=",
    )  # fmt: skip
    assert (container.user, container.working_directory) == ("", "/x")


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (Overrides(entrypoint=("",)), UsageError),
        (Overrides(command=("a\0b",)), UsageError),
        (Overrides(command=("x" * 131072,)), LimitExceeded),
        (Overrides(command=("x",) * 65537), LimitExceeded),
        (Overrides(environment={"A": "\0"}), UsageError),
        (Overrides(command=("x" * 131000,) * 70), LimitExceeded),
    ],
)
def test_what_no_kernel_could_run_is_refused(overrides, error):
    with pytest.raises(error):
        compose(IMAGE, overrides, hostname="h")


def test_environment_of_the_command_line():
    assert parse_environment(["A=1=2", "HOST", "GONE", "E="], {"HOST": "h"}) == {
        "A": "1=2", "HOST": "h", "E": "",
    }  # fmt: skip
    with pytest.raises(UsageError, match="has no name"):
        parse_environment(["=x"], {})


def test_configuration_disk_is_whole_blocks_and_limited():
    config = GuestConfig((ContainerSpec(("x",), (), "", ""),), hostname="h")
    assert len(encode_config(config)) == 4096
    with pytest.raises(LimitExceeded):
        encode_config(GuestConfig(()))
    with pytest.raises(LimitExceeded, match="configuration has"):
        encode_config(GuestConfig((ContainerSpec(("x",), (), "", ""),), hosts=bytes(17 << 20)))


def spec(*disks: NbdDisk | FileDisk, **changes: object) -> MachineSpec:
    values = {"memory_bytes": 256 * MIB, "cpus": 1, "tsc_khz": 2400000, **changes}
    return MachineSpec("t", Path("/k"), Path("/i,x=y"), disks, Path("/d"), **values)  # type: ignore[arg-type]  # only numbers are changed


def test_command_line_carries_hostile_names_as_one_value():
    disk = NbdDisk("root-1", Path('/tmp/a,b="c"'), 'x",driver=file,', read_only=True)
    line = command(MICROVM, spec(disk), channel_fd=7, console_fd=8)
    node = json.loads(line[line.index("-blockdev") + 1])
    assert node["server"] == {"type": "unix", "path": '/tmp/a,b="c"'}
    assert (node["export"], node["read-only"]) == ('x",driver=file,', True)
    assert line[line.index("-initrd") + 1] == "/i,x=y"
    assert json.loads(line[-1])["driver"] == "virtio-blk-device"
    assert json.loads(command(Q35, spec(disk), channel_fd=7, console_fd=8)[-1])["driver"] == (
        "virtio-blk-pci"
    )


def test_kernel_command_line_of_each_platform():
    assert "tsc_early_khz=2400000" in kernel_command_line(MICROVM, spec())
    for platform in (MICROVM, Q35):
        assert "acpi=off" not in kernel_command_line(platform, spec())
    assert "tsc_early_khz" not in kernel_command_line(Q35, spec())
    with pytest.raises(LimitExceeded):
        kernel_command_line(Q35, spec(kernel_arguments=("x" * 3000,)))


def test_the_device_without_a_slot_is_named():
    disks = [FileDisk(f"disk-{number}", Path("/f")) for number in range(23)]
    check_spec(MICROVM, spec(*disks))
    with pytest.raises(LimitExceeded, match=r"disk disk-23 does not fit: a microvm .* 24 slots"):
        check_spec(MICROVM, spec(*disks, FileDisk("disk-23", Path("/f"))))


@pytest.mark.parametrize(
    "bad",
    [
        spec(memory_bytes=16 * MIB),
        spec(cpus=0),
        spec(FileDisk("x" * 21, Path("/f"))),
        spec(FileDisk("a", Path("/f")), FileDisk("a", Path("/g"))),
    ],
)
def test_impossible_machines_are_refused(bad):
    with pytest.raises((LimitExceeded, UsageError)):
        check_spec(MICROVM, bad)


def test_processor_flags():
    assert kvm_flags("flags\t\t: fpu vmx sse")
    assert kvm_flags("flags : svm")
    assert not kvm_flags("flags : fpu sse")
    assert kvm_flags("Features : fp asimd")


def test_archive_is_deterministic():
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.program("init", b"#!/bin/true\n"),
        cpio.plain("odd", b"12345"),
    ]
    archive = cpio.archive(entries)
    assert archive == cpio.archive(entries)
    assert len(archive) % 512 == 0
    assert archive.startswith(b"070701")


def module(name: str, *needs: str) -> bytes:
    return (
        b"\x7fELF"
        + bytes(60)
        + b"\0depends="
        + ",".join(needs).encode()
        + b"\0name="
        + name.encode()
    )


def test_modules_come_in_dependency_order(tmp_path):
    kernel = tmp_path / "kernel/fs"
    kernel.mkdir(parents=True)
    (kernel / "virtio-blk.ko.xz").write_bytes(lzma.compress(module("virtio_blk", "virtio")))
    (kernel / "virtio.ko").write_bytes(module("virtio", "virtio_ring", "virtio"))
    (kernel / "virtio_ring.ko").write_bytes(module("virtio_ring"))
    (kernel / "erofs.ko").write_bytes(module("erofs", "nowhere"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/char/virtio_console.ko\n")
    chosen, missing = select_modules(tmp_path)
    assert [item.file for item in chosen] == [
        "virtio_ring.ko", "virtio.ko", "virtio_blk.ko", "erofs.ko",
    ]  # fmt: skip
    assert missing == ["overlay"]
    assert dependencies(b"no such entry") == []


def test_broken_modules_are_named(tmp_path):
    for name in ("a.ko.xz", "a.ko.gz", "a.ko.zst", "a.ko"):
        (tmp_path / name).write_bytes(b"broken" * 10)
        with pytest.raises(Rejected, match=name if name != "a.ko.zst" else "module"):
            read_module(tmp_path / name)


def test_distributions_without_packages_are_named(tmp_path):
    release = tmp_path / "os-release"
    release.write_text('NAME="Fedora"\nID=fedora\n')
    with pytest.raises(Unsupported, match="this host is fedora"):
        packages_for_host(release)
    release.write_text("ID=ubuntu\n")
    assert packages_for_host(release).kernel == "linux-image-virtual"


def test_cache_directory_follows_the_environment(tmp_path):
    assert default_cache({"CUBECACHE_CACHE_DIR": str(tmp_path)}) == tmp_path / "guest"
    assert default_cache({}).parts[-2:] == (".cache", "guest")


def test_kernel_release_is_read_and_never_a_path(tmp_path):
    kernel = tmp_path / "vmlinuz"
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x400).to_bytes(2, "little")
    for text_, release in (
        (b"6.1.0-x (a@b)", "6.1.0-x"),
        (b"../../etc", "unknown"),
        (b"", "unknown"),
    ):
        image[0x600:0x640] = text_.ljust(64, b"\0")
        kernel.write_bytes(image)
        assert kernel_release(kernel) == release
    kernel.write_bytes(b"raw")
    assert kernel_release(kernel) == "unknown"


def test_field_helpers_agree():
    assert dict(fields(text(1, "a") + field(2, b"b"))) == {1: b"a", 2: b"b"}
