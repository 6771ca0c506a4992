"""The library example of the README, run as it stands there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.pods import PodHost, make_image

README = Path(__file__).parents[2] / "README.md"
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: IMAGE, command: [sh, -c, "echo here; sleep 1000"]}]
"""


def example() -> str:
    (_, code), = [
        part.split("\n", 1)
        for part in README.read_text().split("```")
        if part.startswith("python\n") and "from cube import Cube" in part
    ]  # fmt: skip
    return code


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodHost]:
    directory = tmp_path_factory.mktemp("readme")
    host = PodHost(directory / "s", make_image(directory / "image"))
    yield host
    host.close()


@pytest.mark.quick
def test_the_example_is_python():
    compile(example(), "README.md", "exec")


@pytest.mark.soak
def test_the_example_runs(host: PodHost):
    host.manifest("web", POD)
    # `logs` without `follow` ends with what is there.
    done = subprocess.run(
        [sys.executable, "-c", example()],
        capture_output=True,
        text=True,
        timeout=300,
        env=host.environment,
        cwd=host.state.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Running 0 web\nhere\n"
    assert host.json("list")["pods"] == []
