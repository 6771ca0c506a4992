"""The Firecracker driver against an API server that judges every request by the schema."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from kits.firecracker_server import LATE, Scenario, problems
from kits.until import soon, until
from kits.vm_image import NbdServer

from cube.errors import BootFailed, MachineFailed
from cube.vm.adopted import process_start
from cube.vm.bridge import left_behind
from cube.vm.firecracker import FirecrackerDriver
from cube.vm.firecracker_adopted import clear_left_behind
from cube.vm.firecracker_api import FirecrackerApi
from cube.vm.firecracker_config import Request, bridged_disks, check_firecracker_spec, kernel_words
from cube.vm.jailer import Jail, Jailer, jail_name
from cube.vm.seam import (
    MIB,
    FileDisk,
    MachineSpec,
    NbdDisk,
    Rates,
    TapNic,
    UserNic,
    VhostUserDisk,
)
from imagecache.errors import LimitExceeded, Unsupported, UsageError

MAC = "02:00:00:00:00:01"


class Bench:
    """A machine's files, a program that behaves as a scenario says, and what must not be left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "vm"
        self.home.mkdir()
        self.journal = directory / "journal"
        for name, content in {
            "vmlinux": b"\x7fELF",
            "initrd": b"070701",
            "config.img": bytes(4096),
            "volume.img": bytes(1 << 20),
            "root.img": b"root" * 1024,
        }.items():
            (directory / name).write_bytes(content)
        self.server = NbdServer(directory / "root.img", directory / "nbd.sock")

    def driver(self, *, jailer: Jailer | None = None, **scenario: object) -> FirecrackerDriver:
        """Short deadlines where something hangs."""
        wanted = Scenario(str(self.journal), **scenario)  # type: ignore[arg-type]  # of several types
        hangs = wanted.hang_at or wanted.agent == "absent"
        return FirecrackerDriver(
            wanted.program(self.directory / "firecracker"),
            self.directory / "cache",
            jailer=jailer,
            metrics=True,
            api_seconds=3 if hangs else 60,
            agent_seconds=1 if hangs else 60,
        )

    def spec(self, **changes: object) -> MachineSpec:
        spec = MachineSpec(
            name="web",
            kernel=self.directory / "vmlinux",
            initrd=self.directory / "initrd",
            disks=(
                FileDisk("cube-config", self.directory / "config.img"),
                NbdDisk("root-1", self.directory / "nbd.sock", ""),
                FileDisk("vol-1", self.directory / "volume.img", read_only=False),
            ),
            directory=self.home,
            memory_bytes=256 * MIB,
            cpus=2,
            nics=(TapNic(MAC, "tap0"),),
        )
        return replace(spec, **changes)  # type: ignore[arg-type]  # of several types

    def asked(self) -> dict[str, dict[str, object]]:
        lines = [json.loads(line) for line in self.journal.read_text().splitlines()]
        assert [line for line in lines if line["problems"]] == []
        return {line["path"]: line["body"] for line in lines}

    def left(self) -> list[str]:
        """Files of the machine, and processes whose words or directory are ours."""
        found = sorted(path.name for path in self.home.iterdir())
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes()
                    where = os.readlink(entry / "cwd")
                except OSError:
                    continue
                if str(self.directory) in where or os.fsencode(self.directory / "fire") in words:
                    found.append(words.decode())
        return found


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.server.stop()


async def test_machine_is_configured_by_the_published_schema_and_leaves_nothing(bench):
    spec = bench.spec(rates=Rates(network_bytes=1000))
    machine = await soon(bench.driver(log="a warning").start(spec))
    machine.writer.write(b"frames")
    assert await soon(machine.reader.readexactly(6)) == b"frames"
    assert machine.version == "1.17.0-dev"
    asked = bench.asked()
    assert [*asked][-1] == "/actions"
    assert asked["/machine-config"] == {"vcpu_count": 2, "mem_size_mib": 256}
    assert asked["/boot-source"]["boot_args"].split()[-2:] == [
        "cube.vsock",
        "cube.disks=cube-config,root-1,vol-1",
    ]
    assert asked["/drives/disk1"]["socket"] == "vu-0.sock"
    assert asked["/drives/disk2"]["path_on_host"] == str(bench.directory / "volume.img")
    bucket = {"bandwidth": {"size": 1000, "refill_time": 1000}}
    assert asked["/network-interfaces/net0"]["rx_rate_limiter"] == bucket
    await until(lambda: "a warning" in machine.last_words(), "the log's line")
    await until(lambda: machine.metrics == {"utc_timestamp_ms": 1}, "the metrics")
    await soon(machine.press_ctrl_alt_del())
    assert await soon(machine.wait()) == 0
    await soon(machine.stop())
    await soon(machine.stop())
    assert bench.left() == []


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/logger", "the log"),
        ("/metrics", "the metrics"),
        ("/machine-config", "memory and processors"),
        ("/boot-source", "kernel and initramfs"),
        ("/drives/disk1", "disk root-1"),
        ("/drives/disk2", "disk vol-1"),
        ("/network-interfaces/net0", f"network card {MAC}"),
        ("/vsock", "the agent's channel"),
        ("/actions", "the start"),
    ],
)
async def test_refusal_names_object_fields_and_reason(bench, path, named):
    driver = bench.driver(refuse={path: "not today\x1b[2J"})
    with pytest.raises(BootFailed) as refused:
        await soon(driver.start(bench.spec()))
    told = refused.value.message
    assert f"refuses {named} (PUT {path}: " in told
    assert "400 not today\\x1b[2J" in told
    assert bench.left() == []


@pytest.mark.parametrize("at", ["start", "/boot-source", "/actions"])
async def test_death_of_the_process_is_told_with_its_last_words(bench, at):
    driver = bench.driver(die_at=at, console="kernel panic")
    with pytest.raises(BootFailed) as failed:
        await soon(driver.start(bench.spec()))
    assert "before the guest's agent answered" in failed.value.message
    word = "Error: cannot open the API socket" if at == "start" else "kernel panic"
    assert word in failed.value.console
    assert bench.left() == []


@pytest.mark.parametrize(
    ("scenario", "told"),
    [
        ({"hang_at": "start"}, "API did not answer within 3 seconds"),
        ({"hang_at": "/vsock"}, "did not answer about the agent's channel"),
        ({"agent": "absent"}, "did not listen on vsock port 1024 within 1 seconds"),
        ({"agent": "babble"}, "no vsock device's answer"),
    ],
)
async def test_silence_and_nonsense_have_a_deadline(bench, scenario, told):
    with pytest.raises(BootFailed, match=told):
        await soon(bench.driver(**scenario).start(bench.spec()))
    assert bench.left() == []


async def test_missing_export_and_program_are_told(bench):
    disks = (NbdDisk("root-1", bench.directory / "nowhere.sock", ""),)
    with pytest.raises(BootFailed, match="qemu-storage-daemon ended") as failed:
        await soon(bench.driver().start(bench.spec(disks=disks)))
    assert "nowhere.sock" in str(failed.value)
    driver = FirecrackerDriver(bench.directory / "absent", bench.directory)
    with pytest.raises(BootFailed, match="cannot be started"):
        await soon(driver.start(bench.spec(dies_with_owner=False)))
    assert bench.left() == []


async def test_machine_ends_with_its_bridge(bench):
    machine = await soon(bench.driver().start(bench.spec()))
    os.kill(left_behind(bench.home), 9)
    assert await soon(machine.wait()) == -9
    assert "qemu-storage-daemon ended with status -9" in machine.last_words()
    await soon(machine.stop())
    assert bench.left() == []


async def test_machine_is_adopted_and_ended_by_another_driver(bench):
    driver = bench.driver()
    first = await soon(driver.start(bench.spec()))
    started = process_start(first.process_id)
    first.writer.transport.abort()
    machine = await soon(driver.adopt(first.process_id, started, bench.home))
    machine.writer.write(b"again")
    assert await soon(machine.reader.readexactly(5)) == b"again"
    await soon(machine.stop())
    await soon(first.wait())
    await soon(first.stop())
    assert bench.left() == []
    with pytest.raises(MachineFailed, match="is gone"):
        await soon(driver.adopt(first.process_id, started, bench.home))


async def test_adopted_machine_ends_with_its_bridge(bench):
    driver = bench.driver()
    first = await soon(driver.start(bench.spec()))
    started = process_start(first.process_id)
    machine = await soon(driver.adopt(first.process_id, started, bench.home))
    os.kill(left_behind(bench.home), 9)
    assert await soon(machine.wait()) == 0
    await soon(machine.stop())
    await soon(first.stop())
    assert bench.left() == []


async def test_what_a_lost_keeper_left_is_cleared(bench):
    machine = await soon(bench.driver().start(bench.spec()))
    os.kill(machine.process_id, 9)
    await soon(machine.wait())
    clear_left_behind(bench.home)
    assert not left_behind(bench.home)
    await until(lambda: bench.left() == [], "its bridge to end")
    await soon(machine.stop())


async def test_jail_has_its_options_and_is_removed(bench):
    jailer = Jailer(
        program=Scenario(str(bench.journal)).program(bench.directory / "jailer"),
        uid=65534,
        gid=65534,
        chroot_base=bench.directory / "jails",
        cgroups={"memory.max": "400000000", "cpu.max": "200000 100000"},
        cgroup_root=bench.directory / "cgroup",
        netns=Path("/run/netns/vpc-1"),
        limits={"no-file": 512},
    )
    group = bench.directory / "cgroup/firecracker/vm"
    group.mkdir(parents=True)  # the stand-in makes none
    driver = bench.driver(jailer=jailer)
    with pytest.raises(UsageError, match="die with us"):
        await soon(driver.start(bench.spec()))
    machine = await soon(driver.start(bench.spec(dies_with_owner=False)))
    asked = bench.asked()
    assert asked["jailer"] == {
        "id": "vm",
        "exec_file": str(bench.directory / "firecracker"),
        "uid": "65534",
        "gid": "65534",
        "cgroup_version": "2",
        "parent_cgroup": None,
        "netns": "/run/netns/vpc-1",
        "chroot_base_dir": str(bench.directory / "jails"),
        "cgroup": ["memory.max=400000000", "cpu.max=200000 100000"],
        "resource_limit": ["no-file=512"],
    }
    root = bench.directory / "jails/firecracker/vm/root"
    assert asked["/boot-source"]["kernel_image_path"] == "vmlinux"
    sockets = [asked[f"/drives/disk{index}"]["socket"] for index in range(3)]
    assert {os.stat(root / name).st_uid for name in (*sockets, "log.pipe")} == {65534}
    adopted = await soon(
        driver.adopt(machine.process_id, process_start(machine.process_id), bench.home)
    )
    await soon(adopted.stop())
    await soon(machine.wait())
    await soon(machine.stop())
    assert bench.left() == []
    assert not root.parent.exists()
    assert not group.exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"uid": 0}, UsageError, "must not be root's"),
        ({"cgroup_version": 3}, UsageError, "cgroup version 3"),
        ({"parent_cgroup": "../other"}, UsageError, "no relative path"),
        ({"cgroups": {"memory.max": "1\n2"}}, UsageError, "not FILE=VALUE"),
        ({"cgroups": {"../x": "1"}}, UsageError, "not FILE=VALUE"),
        ({"limits": {"cores": 1}}, UsageError, "no limit cores=1"),
    ],
)
def test_jails_options_are_checked_by_name(change, error, told):
    with pytest.raises(error, match=told):
        replace(Jailer(Path("/j"), 99, 99), **change).check()


@pytest.mark.quick
def test_jail_of_version_1_has_a_group_in_each_hierarchy():
    jailer = Jailer(
        Path("/j"),
        9,
        9,
        cgroup_version=1,
        cgroups={"cpu.shares": "2", "memory.limit_in_bytes": "1"},
    )
    jail = Jail(replace(jailer, parent_cgroup="vms"), Path("/bin/fc"), jail_name("a_b.c"))
    assert [str(one) for one in jail.groups()] == [
        "/sys/fs/cgroup/cpu/vms/a-b-c",
        "/sys/fs/cgroup/memory/vms/a-b-c",
    ]
    words = jail.command(["--api-sock", "api.sock"])
    assert words[-5:] == ["--chroot-base-dir", "/srv/jailer", "--", "--api-sock", "api.sock"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"nics": (UserNic(MAC),)}, Unsupported, "Firecracker has taps only"),
        ({"cpus": 33}, LimitExceeded, "1 to 32"),
        ({"memory_bytes": MIB}, LimitExceeded, "MiB of memory"),
        (
            {"disks": tuple(FileDisk(f"d{index}", Path("/f")) for index in range(20))},
            LimitExceeded,
            "disk d17 does not fit: Firecracker has 19 slots",
        ),
        ({"disks": (FileDisk("a", Path("/f")),) * 2}, UsageError, "used twice"),
    ],
)
def test_what_firecracker_cannot_have_is_refused_by_name(change, error, told):
    spec = MachineSpec("x", Path("/k"), Path("/i"), (), Path("/d"), nics=(TapNic(MAC, "t"),))
    with pytest.raises(error, match=told):
        check_firecracker_spec(replace(spec, **change))


@pytest.mark.quick
def test_disks_that_are_limited_together_share_a_bridge():
    disks = (
        FileDisk("a", Path("/f")),
        NbdDisk("b", Path("/s"), ""),
        VhostUserDisk("c", Path("/v")),
    )
    spec = MachineSpec("x", Path("/k"), Path("/i"), disks, Path("/d"))
    assert bridged_disks(spec, jailed=False) == [disks[1]]
    assert bridged_disks(spec, jailed=True) == [*disks[:2]]
    assert bridged_disks(replace(spec, rates=Rates(disk_bytes=5)), jailed=False) == [*disks[:2]]
    with pytest.raises(LimitExceeded, match="command line"):
        kernel_words(replace(spec, kernel_arguments=("x" * 3000,)))


@pytest.mark.quick
def test_the_judge_knows_the_schema():
    drive = {"drive_id": "a", "is_root_device": False, "path_on_host": "/f", "is_read_only": True}
    assert problems("PUT", "/drives/a", drive, started=False) == []
    assert problems("PUT", "/drives/a", drive, started=True) == [LATE]
    assert problems("PATCH", "/drives/a", drive, started=False)
    assert problems("PUT", "/drive/a", drive, started=False)
    for wrong in (
        {**drive, "socket": "/s"},
        {**drive, "colour": "red"},
        {**drive, "is_read_only": "yes"},
        {**drive, "drive_id": "b"},
        {**drive, "rate_limiter": {"ops": {"size": 5}}},
        {"drive_id": "a", "is_root_device": False},
        {"drive_id": "a", "is_root_device": False, "socket": "/s", "is_read_only": True},
    ):
        assert problems("PUT", "/drives/a", wrong, started=False), wrong
    assert problems("PUT", "/vsock", {"guest_cid": 2, "uds_path": "v"}, started=False)
    assert problems("PUT", "/actions", {"action_type": "Explode"}, started=True)


async def test_answer_that_is_no_api_is_told(tmp_path):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"\x00\xff garbage\r\n\r\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "api.sock"))
    async with server, FirecrackerApi(tmp_path / "api.sock") as api:
        with pytest.raises(BootFailed, match="hung up on the log"):
            await soon(api.put(Request("/logger", {"level": "Info"}, "the log")))
