"""`cubecache run` as a user types it, over a daemon of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from imagemaker.layout import Settings
from kits.image import write_tars
from kits.vm_image import make_tree

CUBECACHE = Path(sys.executable).with_name("cubecache")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("image")
    tree = make_tree(directory / "tree")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tree, arcname=".")
    settings = Settings(
        command=("sh", "-c", "echo hello from $WHO; id -un; pwd; echo bad >&2; exit 5"),
        environment=("WHO=image",),
        user="app",
        working_directory="/home/app",
    )
    return write_tars(directory / "layout", [packed.getvalue()], settings)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("state")
    (directory / "tmp").mkdir()
    return {
        **os.environ,
        "CUBECACHE_STATE_DIR": str(directory / "state"),
        "TMPDIR": str(directory / "tmp"),
    }


def cubecache(environment: dict[str, str], *words: str, **more) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(CUBECACHE), *words], capture_output=True, text=True, env=environment, timeout=300,
        **more,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert not list(Path(environment["TMPDIR"]).glob("cubecache-*"))
    return done


def test_image_defaults_and_timeline(image, environment):
    done = cubecache(environment, "run", "--timeline", image)
    assert done.returncode == 5
    assert done.stdout == "hello from image\napp\n/home/app\n"
    assert done.stderr.startswith("bad\n")
    for word in ("export ready", "init", "root-mounted", "first-output", "bytes read"):
        assert word in done.stderr


def test_options_override_and_json_stands_alone(image, environment):
    script = 'echo "$WHO|$X|$(id -u)|$(pwd)|$(hostname)|$0"; cat; exit 3'
    done = cubecache(
        environment,
        *("run", "--json", "-i", "-e", "WHO=me", "--env", "X=a b", "--user", "0", "--workdir"),
        *("/w", "--hostname", "box", "--memory", "300M", "--cpus", "2", "--entrypoint", "sh"),
        *(image, "--", "-c", script, "zero"),
        input="typed\n",
    )
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_status"] == 3
    assert done.stderr == "me|a b|0|/w|box|zero\ntyped\n"
    assert set(answer) >= {"image", "block_image", "timeline", "read_bytes", "machine"}
    assert answer["timeline"]["init"] > 0


def test_missing_program_is_said(image, environment):
    done = cubecache(environment, "run", image, "--", "no-such-program", "--json")
    assert done.returncode == 127
    assert 'cannot run "no-such-program": not found in PATH' in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("--memory", "12"), 65, "12 MiB of memory"),
        (("--memory", "lots"), 2, "not a size"),
        (("--cpus", "0"), 65, "0 processors"),
        (("--env", "=x"), 2, "has no name"),
        (("--hostname", "-bad-"), 2, "not a DNS name"),
        (("--kernel", "/no/kernel"), 66, "/no/kernel does not exist"),
        (("--timeout", "0.5"), 69, "did not end within 0.5 seconds"),
    ],
)
def test_what_cannot_be_done_is_said(image, environment, words, code, reason):
    done = cubecache(environment, "run", *words, image)
    assert done.returncode == code
    assert reason in done.stderr


def test_absent_image_is_not_found(environment, tmp_path):
    done = cubecache(environment, "run", f"oci:{tmp_path}/none")
    assert done.returncode == 66


def test_interrupt_ends_the_program(image, environment):
    run = subprocess.Popen(
        [str(CUBECACHE), "run", image, "--", "sh", "-c", "echo up; sleep 1000"],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    run.stdout.close()
    assert not list(Path(environment["TMPDIR"]).glob("cubecache-*"))
