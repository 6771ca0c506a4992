"""The command line under bad use: exit codes, usage, closed pipes, interrupts (rows K, A25)."""

import json
import os
import subprocess
import time
from collections.abc import Callable

import pytest
from kits.image import recipe_layout, reference
from kits.journey import COMMAND, Cubecache

COMMANDS = (
    "preload serve export exports unexport mount umount run images inspect verify rm doctor".split()
)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--no-such-flag"],
        ["no-such-command"],
        ["preload"],
        ["preload", "--no-such-flag", "x"],
        ["export"],
        ["mount", "oci:/tmp/x"],
        ["--store", "gopher://x", "images"],
        ["--store", "s3://", "images"],
        ["--store", "file://relative", "images"],
    ],
)
def test_misuse_is_exit_2_with_usage_on_stderr(cubecache: Cubecache, arguments: list[str]) -> None:
    """K1: no arguments, unknown flags, bad URLs: exit 2 and a word on stderr, nothing on stdout."""
    answer = cubecache.run(*arguments, expect=2)
    assert answer.out == ""
    assert answer.err.strip()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(cubecache: Cubecache, command: str) -> None:
    answer = cubecache.run(*command.split(), "--help")
    assert "Usage" in answer.out or "usage" in answer.out


@pytest.mark.parametrize(
    "image",
    [
        "",
        "UPPER/x",
        "host.example/a..b/c d",
        "host.example/repo:",
        "host.example/../etc/passwd",
        "host.example/repo:tag:tag",
        "host.example/repo@sha256:12",
        "host.example/repo@md5:d41d8cd98f00b204e9800998ecf8427e",
        "host.example/\u00e9t\u00e9",
        "host.example/" + "r" * 300,
        "oci:",
        "docker-archive:",
    ],
)
def test_a_malformed_reference_is_misuse(cubecache: Cubecache, image: str) -> None:
    """A25: a reference outside the grammar is exit 2 and named in the message."""
    answer = cubecache.run("preload", image, expect=2)
    assert answer.out == ""
    assert image[:40] in answer.err or ascii(image)[1:40] in answer.err


def test_what_is_not_there_and_who_does_not_answer_differ(
    cubecache: Cubecache, registry, busybox: str
) -> None:
    """A24: not found is 66, could not ask is 69; both name what was asked for."""
    missing = f"{registry.address}/journeys/no-such:tag"
    assert missing.rpartition(":")[0] in cubecache.run("preload", missing, expect=66).err
    silent = "127.0.0.1:1/journeys/image:tag"
    assert "127.0.0.1:1" in cubecache.run("preload", silent, expect=69).err
    assert cubecache.run("preload", "oci:/no/such/layout", expect=66).err
    assert cubecache.run("preload", "docker-archive:/no/such/file", expect=66).err
    assert cubecache.run("verify", busybox, expect=66).err
    assert cubecache.run("images", "--json").json() == []


def test_without_a_daemon_the_daemon_s_commands_are_69(cubecache: Cubecache) -> None:
    """K4: an absent daemon is a message and exit 69."""
    assert "daemon" in cubecache.run("unexport", "name", expect=69).err
    assert "daemon" in cubecache.run("exports", expect=69).err


@pytest.mark.parametrize(
    "arguments",
    [
        ["preload", "UPPER/x"],
        ["preload", "oci:/no/such/layout"],
        ["preload", "127.0.0.1:1/journeys/image:tag"],
        ["unexport", "name"],
        ["exports"],
        ["inspect", "oci:/no/such/layout"],
        ["verify", "oci:/no/such/layout"],
        ["rm", "oci:/no/such/layout"],
        ["images"],
        ["doctor"],
    ],
)
def test_json_is_valid_on_every_path(cubecache: Cubecache, arguments: list[str]) -> None:
    """K5: with --json stdout holds JSON alone, errors included."""
    answer = cubecache.run(*arguments, "--json", expect=None)
    for line in [answer.out] if answer.out.startswith(("[", "{\n")) else answer.out.splitlines():
        json.loads(line)
    if answer.code:
        assert answer.out.strip() or answer.err.strip()


def test_a_plain_terminal_and_a_closed_pipe(cubecache: Cubecache, busybox: str) -> None:
    """K2: no TERM, LANG=C, stdout closed: no traceback, exit 0 or 141."""
    for command in (["--help"], ["doctor"], ["preload", busybox], ["images", "--json"]):
        answer = cubecache.run(*command, environment={"TERM": "", "LANG": "C", "LC_ALL": "C"})
        assert "\x1b" not in answer.out + answer.err
    for command in (["--help"], ["images", "--json"], ["inspect", busybox]):
        reader, writer = os.pipe()
        os.close(reader)
        outcome = subprocess.run(
            cubecache.command(*command),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            env=cubecache.full_environment(),
        )
        os.close(writer)
        assert outcome.returncode in (0, 141), outcome.stderr
        assert b"Traceback" not in outcome.stderr
        assert b"Exception ignored" not in outcome.stderr


def test_ctrl_c_leaves_nothing_half_made_and_the_next_try_goes_on(
    new_cubecache: Callable[..., Cubecache],
) -> None:
    """K3: an interrupt at any moment is exit 130 without a traceback; then preload works."""
    image = reference(recipe_layout("python-numpy"))
    cubecache = new_cubecache()
    for seconds in (0.0, 0.3, 0.8, 1.6):
        answer = cubecache.interrupted("preload", image, "--json", seconds=seconds)
        assert "Traceback" not in answer.err, answer.err
        assert answer.code in (130, -2), f"after {seconds} s: {answer}"
        assert answer.out == ""
    assert cubecache.run("images", "--json").json() == []
    found = cubecache.preload(image)
    cubecache.run("verify", image)
    assert found["chunks"] > 0


def test_doctor_tells_what_this_host_can_do(cubecache: Cubecache) -> None:
    answer = cubecache.run("doctor", "--json", expect=None)
    assert answer.code in (0, 78)
    assert "qemu" in answer.out.lower()


def test_a_state_dir_that_cannot_be_is_said_so(new_cubecache, tmp_path) -> None:
    """K7, H1: a state dir that is a file, or below one, is an error that names it."""
    cubecache = new_cubecache()
    cubecache.state.write_text("a file")
    answer = cubecache.run("images", expect=None)
    assert answer.code not in (0, 1, 70)
    assert str(cubecache.state) in answer.err


def test_version_is_quick_and_needs_nothing(cubecache: Cubecache) -> None:
    outcome = subprocess.run(
        [str(COMMAND), "--version"], check=True, capture_output=True, text=True, env={"PATH": ""}
    )
    assert "0.1" in outcome.stdout
    assert not cubecache.state.exists()


def test_the_state_dir_comes_from_the_environment_too(cubecache: Cubecache, busybox: str) -> None:
    cubecache.preload(busybox)
    outcome = subprocess.run(
        [str(COMMAND), "images", "--json"],
        check=True,
        capture_output=True,
        text=True,
        env=cubecache.full_environment({"CUBECACHE_STATE_DIR": str(cubecache.state)}),
    )
    assert outcome.stdout == cubecache.run("images", "--json").out


def test_the_config_file_may_set_what_flags_set(
    cubecache: Cubecache, busybox: str, tmp_path
) -> None:
    """J10: a missing or broken config file refuses to start, with the file's name."""
    broken = tmp_path / "broken.toml"
    broken.write_text("store = [unclosed")
    for path in (tmp_path / "absent.toml", broken):
        outcome = subprocess.run(
            [str(COMMAND), "--config", str(path), "images"],
            check=False,
            capture_output=True,
            text=True,
            env=cubecache.full_environment(),
        )
        assert outcome.returncode not in (0, 1, 70)
        assert str(path) in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_a_hung_daemon_does_not_hang_the_command(cubecache: Cubecache) -> None:
    """K4: a control socket that accepts and says nothing ends with 69, not never."""
    import socket

    cubecache.state.mkdir()
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(cubecache.state / "control.sock"))
        hung.listen(8)
        begin = time.monotonic()
        answer = cubecache.run("exports", expect=69, seconds=90)
    assert answer.err
    assert time.monotonic() > begin
