"""./tools/setup refuses by name, and installs nothing then."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setup(tmp_path: Path, release: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "os-release"
    path.write_text(release)
    return subprocess.run(
        [str(ROOT / "tools/setup"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"CUBECACHE_OS_RELEASE": str(path)},
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("release", "name"),
    [
        ('ID=fedora\nVERSION_ID=42\nPRETTY_NAME="Fedora Linux 42"\n', "Fedora Linux 42"),
        ('ID=debian\nVERSION_ID="11"\nPRETTY_NAME="Debian 11"\n', "Debian 11"),
        ('ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04"\n', "Ubuntu 22.04"),
        ('ID=linuxmint\nID_LIKE=ubuntu\nVERSION_ID="22"\n', "linuxmint"),
        ("", "this system"),
    ],
)
def test_other_systems_are_refused_by_name(tmp_path: Path, release: str, name: str) -> None:
    outcome = setup(tmp_path, release)
    assert outcome.returncode == 78
    assert name in outcome.stderr
    assert "installing" not in outcome.stderr


@pytest.mark.quick
def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    outcome = setup(tmp_path, "ID=fedora\n", "--runtyme")
    assert outcome.returncode == 2
    assert "--runtyme" in outcome.stderr


@pytest.mark.quick
def test_every_package_has_a_set_and_a_reason() -> None:
    for line in (ROOT / "tools/packages.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, kind, architecture, reason = line.split(maxsplit=3)
        assert kind in ("runtime", "test", "debian"), name
        assert architecture in ("any", "amd64", "arm64"), name
        assert reason, name
