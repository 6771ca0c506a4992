"""Programs in real microVMs: statuses, environment, users, streams, file systems."""

from __future__ import annotations

import hashlib
import time

import pytest

from cube.container import Overrides
from cube.errors import Overdue
from imagecache.errors import LimitExceeded


async def test_status_streams_and_timeline(run_guest):
    ran = await run_guest("sh", "-c", "echo to-out; echo to-err >&2; exit 7")
    assert ran.code == 7
    assert (ran.stdout, ran.stderr) == (b"to-out\n", b"to-err\n")
    names = [name for name, _ in ran.outcome.timeline]
    assert names == ["init", "modules-loaded", "root-mounted", "exec", "first-output", "exit"]
    assert 0 < ran.outcome.exit.read_bytes < 4 << 20


async def test_environment_user_and_working_directory(run_guest):
    script = (
        'echo "$LEVEL|$SPACED|$HOME|$PATH"; id -u; id -g; id -G; pwd; cat /home/app/secret; '
        "touch /root/x 2>/dev/null || echo refused; echo again > /dev/stdout; umask"
    )
    ran = await run_guest(
        overrides=Overrides(
            command=("sh", "-c", script),
            environment={"LEVEL": "3", "SPACED": "a b\n'c'"},
            user="app",
            working_directory="/srv/made/here",
        )
    )
    lines = ran.text.splitlines()
    assert "\n".join(lines[:2]) == (
        "3|a b\n'c'|/home/app|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    )
    assert lines[2:] == [
        "1000", "1000", "1000 44 2000", "/srv/made/here", "for app only", "refused", "again",
        "0022",
    ]  # fmt: skip
    assert ran.code == 0


async def test_numeric_user_and_group_without_account(run_guest):
    script = "id -u; id -g; id -G; echo $HOME"
    ran = await run_guest(overrides=Overrides(command=("sh", "-c", script), user="4242:77"))
    assert ran.text.split() == ["4242", "77", "77", "/"]


async def test_unknown_user_is_named(run_guest):
    ran = await run_guest(overrides=Overrides(command=("true",), user="nobody-here"))
    assert ran.code == 125
    assert ran.outcome.exit.problem == 'the image\'s /etc/passwd has no user "nobody-here"'


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("nothere", 127, '"nothere": not found in PATH'),
        ("/nothere", 127, "no such file"),
        ("no-loader", 127, "interpreter"),
        ("plain-file", 126, "not executable"),
        ("/etc", 126, "it is a directory"),
        ("not-a-program", 126, "not a program"),
    ],
)
async def test_what_cannot_be_run_is_said(run_guest, command, code, words):
    ran = await run_guest(command)
    assert ran.code == code
    assert words in ran.outcome.exit.problem
    assert "exec" not in dict(ran.outcome.timeline)


async def test_signal_death_is_128_plus_signal(run_guest):
    ran = await run_guest("sh", "-c", "echo before; kill -9 $$")
    assert (ran.code, ran.outcome.exit.signal, ran.stdout) == (137, 9, b"before\n")


async def test_root_is_erofs_below_and_writable_above(run_guest):
    script = (
        "awk '$2 == \"/\" {print $3}' /proc/mounts; stat -f -c %T /; cat /etc/image-release; "
        "echo changed > /etc/image-release; cat /etc/image-release; rm /bin/plain-file; "
        "test -e /bin/plain-file || echo removed; dd if=/dev/zero of=/var/big bs=1M count=64 "
        "2>/dev/null; stat -c %s /var/big"
    )
    ran = await run_guest("sh", "-c", script)
    lines = ran.text.splitlines()
    assert lines[0] == "overlay"
    assert lines[2:] == ["made for tests", "changed", "removed", str(64 << 20)]


async def test_kernel_file_systems_and_devices(run_guest):
    script = """
    stat -c '%a %F' /tmp /dev/shm
    for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$d; done
    for l in fd stdin ptmx; do readlink /dev/$l; done
    awk '{print $2 " " $3}' /proc/mounts
    echo gone > /dev/null; head -c 4 /dev/zero | wc -c; head -c 16 /dev/urandom | wc -c
    ls /dev | grep -c vd
    cat /sys/class/net/lo/operstate; ip addr show lo | grep -c 127.0.0.1
    hostname; cat /etc/hostname; grep -c localhost /etc/hosts
    grep -c ' /sys sysfs ro,' /proc/mounts
    """
    ran = await run_guest("sh", "-c", script)
    lines = ran.text.splitlines()
    assert lines[:2] == ["1777 directory", "1777 directory"]
    assert lines[2:8] == [
        "/dev/null 1:3 666", "/dev/zero 1:5 666", "/dev/full 1:7 666", "/dev/random 1:8 666",
        "/dev/urandom 1:9 666", "/dev/tty 5:0 666",
    ]  # fmt: skip
    assert lines[8:11] == ["/proc/self/fd", "/proc/self/fd/0", "pts/ptmx"]
    mounts = dict(line.split() for line in lines[11:19])
    assert mounts == {
        "/": "overlay", "/proc": "proc", "/sys": "sysfs", "/sys/fs/cgroup": "cgroup2",
        "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/dev/mqueue": "mqueue",
    }  # fmt: skip
    assert lines[19:22] == ["4", "16", "0"]
    assert lines[23] == "1"
    assert lines[24] == lines[25]
    assert lines[24].startswith("cube-")
    assert lines[26:] == ["2", "1"]


async def test_clock_is_the_hosts(run_guest):
    before = int(time.time())
    ran = await run_guest("date", "+%s")
    assert before - 1 <= int(ran.text) <= int(time.time()) + 1


async def test_root_keeps_only_the_customary_capabilities(run_guest):
    ran = await run_guest(
        "sh", "-c", "grep -E 'Cap(Eff|Bnd|Inh)' /proc/self/status; mount -t tmpfs x /tmp || echo no"
    )
    lines = dict(line.split(":\t") for line in ran.text.splitlines() if ":" in line)
    assert lines["CapEff"] == lines["CapBnd"] == "00000000a80425fb"
    assert lines["CapInh"] == "0000000000000000"
    assert ran.text.endswith("no\n")


async def test_large_output_is_whole_and_ordered(run_guest):
    count = 20 << 20
    script = f"yes 0123456789abcde | head -c {count}; yes err | head -c 100000 >&2"
    ran = await run_guest("sh", "-c", script)
    assert len(ran.stdout) == count
    expected = hashlib.sha256(b"0123456789abcde\n" * (count // 16)).digest()
    assert hashlib.sha256(ran.stdout).digest() == expected
    assert ran.stderr == b"err\n" * 25000


async def test_background_children_end_with_the_program(run_guest):
    ran = await run_guest("sh", "-c", "(sleep 1000; echo late) & (exit 3) & echo done; exit 4")
    assert (ran.code, ran.stdout) == (4, b"done\n")


async def test_stdin_reaches_the_program_and_ends(run_guest):
    content = bytes(range(256)) * 4096
    ran = await run_guest("sha256sum", stdin=content)
    assert ran.text.split()[0] == hashlib.sha256(content).hexdigest()
    assert ran.code == 0


async def test_program_that_ignores_its_stdin_ends(run_guest):
    ran = await run_guest("true", stdin=bytes(1 << 20))
    assert ran.code == 0


async def test_two_processors_and_a_thousand_arguments(run_guest):
    words = [str(number) for number in range(5000)]
    ran = await run_guest("sh", "-c", "grep -c ^processor /proc/cpuinfo; echo $#", *words, cpus=2)
    assert ran.text.split() == ["2", "4999"]


async def test_overdue_program_is_ended(run_guest):
    with pytest.raises(Overdue, match="did not end within 5 seconds"):
        await run_guest("sleep", "1000", seconds=5)


@pytest.mark.parametrize("cpus", [0, 65])
async def test_impossible_machine_is_refused(run_guest, cpus):
    with pytest.raises(LimitExceeded, match="processors"):
        await run_guest("true", cpus=cpus)
