"""The keeper's small parts: back-off, status, plan, record, logs, orphans, QEMU's words."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cube.container import ALL_CAPABILITIES, ImageDefaults
from cube.keeper.backoff import BackOff, wants_restart
from cube.keeper.disks import claim_path, provide_disk
from cube.keeper.guestplan import (
    DiskWish,
    Facts,
    Image,
    capability_bits,
    expand,
    plan_machine,
)
from cube.keeper.logfile import FILE_LIMIT, LINE_LIMIT, LogQuery, LogWriter, read_log
from cube.keeper.orphans import find_orphans
from cube.keeper.record import MachineRow, PodRow, Record
from cube.keeper.status import first_status
from cube.pod.manifests import parse_manifests
from cube.pod.model import Container, Pod, RestartPolicy, Security
from cube.vm.qemu_command import Platform, check_spec, command
from cube.vm.seam import FileDisk, Forward, MachineSpec, Rates, TapNic, UserNic
from imagecache.errors import Corrupt, LimitExceeded, NotFound, UsageError

pytestmark = pytest.mark.quick
FACTS = Facts("aabbccddeeff", "10.0.2.15", "10.0.2.2", "node", "02:aa:bb:cc:dd:ee")


def test_restarts_wait_as_the_source_says():
    back_off = BackOff()
    assert [back_off.next_delay(1) for _ in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert [back_off.next_delay(601), back_off.next_delay(1)] == [0, 10]


@pytest.mark.parametrize(
    ("policy", "code", "init", "again"),
    [
        (RestartPolicy.ALWAYS, 0, False, True),
        (RestartPolicy.ALWAYS, 0, True, False),
        (RestartPolicy.ALWAYS, 1, True, True),
        (RestartPolicy.ON_FAILURE, 0, False, False),
        (RestartPolicy.ON_FAILURE, 1, False, True),
        (RestartPolicy.NEVER, 1, False, False),
    ],
)
def test_who_is_started_again(policy, code, init, again):
    assert wants_restart(policy, code, init=init) is again


def test_references_are_expanded_once():
    values = {"A": "1", "B": "$(A)"}
    assert expand("$(A)-$(B)-$$(A)-$(C)-$A-$(", values) == "1-$(A)-$(A)-$(C)-$A-$("


def test_capabilities():
    plain = capability_bits(Security())
    assert capability_bits(Security(drop=("ALL",))) == 0
    assert capability_bits(Security(drop=("ALL",), add=("CHOWN",))) == 1
    assert capability_bits(Security(add=("NET_ADMIN",))) == plain | 1 << 12
    assert capability_bits(Security(privileged=True)) == ALL_CAPABILITIES


def pod_of(spec: str) -> Pod:
    head = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, labels: {app: x}}\nspec: "
    return parse_manifests((head + spec).encode()).pods[0]


def test_a_plan_says_everything_to_the_guest():
    pod = pod_of(
        "{containers: [{name: a, image: i, command: [run, $(X)], env: [{name: X, value: v}, "
        "{name: Y, value: $(X)/$(Z)}, {name: IP, valueFrom: {fieldRef: "
        "{fieldPath: status.podIP}}}],"
        " resources: {limits: {cpu: 1200m, memory: 64Mi}}}, {name: b, image: i, args: [w]}],"
        " initContainers: [{name: c, image: i}], hostAliases: [{ip: 1.2.3.4, hostnames: [h]}],"
        " volumes: [{name: e, emptyDir: {}}, {name: k, udisk: {id: d}}]}"
    )
    image = Image(ImageDefaults(("entry",), ("cmd",), ("P=1",), "u", "/w"), "erofs")
    plan = plan_machine(pod, dict.fromkeys("abc", image), FACTS, sync_key=b"k" * 16)
    first, a, b = plan.config.containers
    assert (first.name, first.id, a.id, b.id) == ("c", 1, 2, 3)
    assert a.arguments == ("run", "v") and b.arguments == ("entry", "w")
    assert {"X=v", "Y=v/$(Z)", "IP=10.0.2.15", "P=1"} <= set(a.environment)
    assert not a.autostart and a.user == "u" and a.cpu_millis == 1200
    assert plan.cpus == 2 and plan.memory_bytes == (64 + 256 + 128) << 20
    assert plan.disks == (DiskWish("vol-1"), DiskWish("vol-2", claim="d"))
    assert b"1.2.3.4\th" in plan.config.hosts


def test_root_is_refused_where_the_manifest_forbids_it():
    pod = pod_of("{containers: [{name: a, image: i, securityContext: {runAsNonRoot: true}}]}")
    with pytest.raises(UsageError, match="container a: runAsNonRoot"):
        plan_machine(pod, {"a": Image(ImageDefaults(("x",)), "erofs")}, FACTS, sync_key=b"k" * 16)


def status_of(*changes: dict, **whole: object):
    containers = tuple(Container(name=f"c{n}", image="i") for n in range(len(changes)))
    status = first_status(Pod(name="p", containers=containers), "u", 1.0)
    for one, change in zip(status.containers, changes, strict=True):
        for name, value in change.items():
            setattr(one, name, value)
    for name, value in whole.items():
        setattr(status, name, value)
    status.settle()
    return status


def test_states_are_those_of_the_source():
    running = {"state": "running", "reason": "Running", "ready": True}
    done = {"state": "terminated", "reason": "Completed"}
    failed = {"state": "terminated", "reason": "Error", "code": 3}
    looping = {"state": "waiting", "reason": "CrashLoopBackOff", "restarts": 2}
    assert status_of({}).state == "Pending"
    assert status_of({"reason": "ContainerCreating"}).state == "ContainerCreating"
    assert status_of(running, looping).state == "CrashLoopBackOff"
    assert status_of(running, running).ready
    assert status_of(done, done).state == "Completed"
    assert status_of(done, failed).state == "Error"
    assert status_of(running, terminating=True).state == "Terminating"
    assert status_of({"reason": "ErrImagePull"}).settled


def test_the_record_comes_back(tmp_path: Path):
    path = tmp_path / "pods.sqlite"
    pod = pod_of("{containers: [{name: a, image: i}]}")
    row = PodRow(pod, first_status(pod, "u1", 2.0), MachineRow(7, 8, "00ff", ("e",)), True)
    record = Record(path)
    record.open()
    record.save(row)
    record.close()
    record.open()
    assert record.pods() == [row]
    record.forget("u1")
    assert record.pods() == []
    record.close()
    assert path.stat().st_mode & 0o77 == 0
    path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(Corrupt, match="damaged"):
        Record(path).open()


async def collect(directory: Path, **query: object) -> str:
    lines = read_log(directory, LogQuery(**query), lambda: True)  # type: ignore[arg-type]  # test's own keywords
    return b"".join([line.text async for line in lines]).decode()


async def test_logs_keep_lines_runs_and_bounds(tmp_path: Path):
    for run in range(4):
        log = LogWriter(tmp_path)
        log.write("stdout", f"run {run}\nha".encode(), 100.0 + run)
        log.write("stdout", b"lf\n", 100.0 + run)
        log.write("stderr", b"x" * (LINE_LIMIT + 5), 100.0 + run)
        log.close(101.0 + run)
    long = "x" * (LINE_LIMIT + 5) + "\n"
    assert await collect(tmp_path) == f"run 3\nhalf\n{long}"
    assert await collect(tmp_path, previous=True) == f"run 2\nhalf\n{long}"
    assert await collect(tmp_path, since=104.0) == "x" * 5 + "\n"
    assert await collect(tmp_path, tail=0) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.log", "3.log"]
    first = (tmp_path / "3.log").read_bytes().splitlines()[0]
    assert first == b"1970-01-01T00:01:43.000000000Z stdout F run 3"
    with pytest.raises(NotFound):
        await collect(tmp_path / "none", previous=True)


async def test_a_resumed_log_goes_on(tmp_path: Path):
    for number, resumed in enumerate((False, True)):
        log = LogWriter(tmp_path, resumed=resumed)
        log.write("stdout", f"part {number}\n".encode(), 1.0)
        log.close(1.0)
    assert await collect(tmp_path) == "part 0\npart 1\n"


async def test_a_full_log_is_replaced_once(tmp_path: Path):
    log = LogWriter(tmp_path)
    for number in range(40):
        log.write("stdout", (str(number % 10) * 1023 + "\n").encode() * 1024, 5.0)
    log.close(6.0)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= FILE_LIMIT


async def test_a_follower_sees_what_comes(tmp_path: Path):
    log = LogWriter(tmp_path)
    log.write("stdout", b"one\n", 1.0)
    over = asyncio.Event()
    seen: list[bytes] = []

    async def follow() -> None:
        async for line in read_log(tmp_path, LogQuery(follow=True), over.is_set):
            seen.append(line.text)
            if line.text == b"one\n":
                log.write("stdout", b"two\n", 2.0)
                log.close(2.0)
                following = LogWriter(tmp_path)
                following.write("stdout", b"three\n", 3.0)
                following.close(3.0)
            if line.text == b"three\n":
                over.set()

    await asyncio.wait_for(follow(), 60)
    assert seen == [b"one\n", b"two\n", b"three\n"]


def test_disks_are_made_once_and_claims_stay(tmp_path: Path):
    wish = DiskWish("vol-1", size_bytes=8 << 20, claim="data")
    path = provide_disk(tmp_path, tmp_path / "pod", wish, first=True)
    assert path == claim_path(tmp_path, "data") and path.stat().st_size == 8 << 20
    assert path.read_bytes()[1080:1082] == b"\x53\xef"  # ext4's magic
    before = path.stat().st_ino
    assert provide_disk(tmp_path, tmp_path, wish, first=True).stat().st_ino == before
    forced = DiskWish("vol-1", size_bytes=8 << 20, claim="data", format=True)
    assert provide_disk(tmp_path, tmp_path, forced, first=False).stat().st_ino == before
    assert provide_disk(tmp_path, tmp_path, forced, first=True).stat().st_ino != before


def test_leftovers_are_found(tmp_path: Path):
    for uid in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        (tmp_path / uid).mkdir()
    exports = ["pod-aaaaaaaaaaaa-1", "pod-cccccccccccc-2", "other"]
    found = find_orphans(tmp_path, frozenset(["aaaaaaaaaaaa"]), frozenset(), exports)
    assert [(one.kind, one.pod) for one in found] == [
        ("directory", "bbbbbbbbbbbb"),
        ("export", "cccccccccccc"),
    ]


MICROVM = Platform(Path("/qemu"), "microvm", "tcg")


def spec_of(**changes: object) -> MachineSpec:
    return MachineSpec("x", Path("/k"), Path("/i"), (), Path("/d"), **changes)  # type: ignore[arg-type]  # test's own keywords


def test_network_cards_and_rates_in_qemus_words():
    spec = spec_of(
        nics=(UserNic("02:00", (Forward("127.0.0.1", 80, 8080),)), TapNic("02:01", "tap0")),
        rates=Rates(disk_bytes=5, disk_operations=7),
    )
    spec = MachineSpec(**{name: getattr(spec, name) for name in spec.__slots__} | {
        "disks": (FileDisk("d", Path("/f")),)
    })  # fmt: skip
    words = command(MICROVM, spec, channel_fd=3, console_fd=4)
    netdevs = [words[at + 1] for at, word in enumerate(words) if word == "-netdev"]
    assert netdevs == [
        "user,id=net0,ipv6=off,hostfwd=tcp:127.0.0.1:80-:8080",
        "tap,id=net1,ifname=tap0,script=no,downscript=no",
    ]
    group = json.loads(words[words.index("-object") + 1])
    assert group["limits"] == {"bps-total": 5, "iops-total": 7}
    node = json.loads(words[words.index("-blockdev") + 1])
    assert (node["driver"], node["node-name"]) == ("throttle", "disk0")


def test_the_slot_that_is_missing_is_named():
    disks = tuple(FileDisk(f"d{number}", Path("/f")) for number in range(23))
    spec = MachineSpec("x", Path("/k"), Path("/i"), disks, Path("/d"), nics=(UserNic("02:00"),))
    with pytest.raises(LimitExceeded, match="disk d22 does not fit: a microvm machine has 24"):
        check_spec(MICROVM, spec)
