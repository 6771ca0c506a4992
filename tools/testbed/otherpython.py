"""A second Python: that of another release of the host's distribution, in a tree of its own.

mmdebstrap unpacks the release's `python3` from the host's mirror, pip puts wheels of our
dependencies for that version beside it. Both are made once per checkout, in `.cache/`. Commands run
chrooted into the tree, in a mount namespace where chosen folders of the host are shown; needs root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from imagemaker.distribution import MakeImageError, host_sources, suite

from testbed.machine import ROOT

OTHER_RELEASE = {"bookworm": "trixie", "trixie": "bookworm", "noble": "questing"}
"""By code name of the host's release: one of the same mirror and keyring with another Python."""

MANYLINUX = ("_2_34", "_2_28", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
_FORMAT = 1
_SECONDS = 900


class OtherPython:
    """The tree, made where it is not there; raises `MakeImageError`."""

    def __init__(self, cache: Path = ROOT / ".cache" / "otherpython") -> None:
        name = OTHER_RELEASE.get(suite())
        if name is None:
            raise MakeImageError(f"no second release is known beside {suite()}")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        needed = sorted(project["project"]["dependencies"])
        identity = json.dumps([_FORMAT, name, needed])
        self.tree = cache / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        if not self.tree.exists():
            partial = cache / f"{self.tree.name}.{os.getpid()}.partial"
            try:
                _unpack(name, partial)
                _install(partial, needed)
                partial.rename(self.tree)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def command(self, arguments: Sequence[str], shown: Sequence[Path]) -> list[str]:
        """A command line of this Python; `shown` are host folders at their own paths, writable."""
        tree = shlex.quote(str(self.tree))
        steps = ["set -eu", f"mount --bind {tree} {tree}", f"mount -t proc proc {tree}/proc"]
        for folder in (ROOT, Path("/dev"), *shown):
            inside = shlex.quote(f"{self.tree}{folder}")
            steps += [f"mkdir -p {inside}", f"mount --rbind {shlex.quote(str(folder))} {inside}"]
        steps.append(f'exec chroot {tree} /usr/bin/python3 "$@"')
        script = "\n".join(steps)
        inner = ["sh", "-c", script, "otherpython", *arguments]
        return ["unshare", "--mount", "--propagation", "private", *inner]

    def environment(self) -> dict[str, str]:
        """What its commands need in their environment."""
        return {
            "PYTHONPATH": f"{ROOT}:/opt/site",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @property
    def version(self) -> str:
        """Such as 3.13."""
        return _version(self.tree)


def _version(tree: Path) -> str:
    return (tree / "usr/bin/python3").readlink().name.removeprefix("python")


def _unpack(name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = re.sub(rf"\b{suite()}\b", name, host_sources())
    # Updates and security of another release may be elsewhere; its first state is enough.
    sources = re.sub(rf"^(Suites:).*\b{name}\b.*$", rf"\1 {name}", sources, flags=re.MULTILINE)
    stanzas = [s for s in re.split(r"\n\s*\n", sources.strip()) if "security" not in s]
    suffix = ".sources" if "Suites:" in sources else ".list"
    with tempfile.NamedTemporaryFile("w", suffix=suffix, encoding="utf-8") as file:
        file.write("\n\n".join(stanzas) + "\n")
        file.flush()
        Path(file.name).chmod(0o644)
        command = ["mmdebstrap", "--variant=extract", "--include=python3,ca-certificates"]
        command += ["--aptopt=Acquire::Retries 5", name, str(target), file.name]
        _run(command)
    for folder in ("bin", "sbin", "lib", "lib64"):
        if not (target / folder).exists() and (target / "usr" / folder).exists():
            (target / folder).symlink_to(f"usr/{folder}")
    for folder in ("proc", "tmp"):
        (target / folder).mkdir(exist_ok=True)


def _install(tree: Path, needed: Sequence[str]) -> None:
    machine = os.uname().machine
    command = [str(ROOT / ".venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--only-binary=:all:", "--retries=5", "--implementation=cp"]
    command += [f"--platform=manylinux{tag}_{machine}" for tag in MANYLINUX]
    command += [f"--python-version={_version(tree)}", "--target", str(tree / "opt/site")]
    _run([*command, *needed])


def _run(command: Sequence[str]) -> None:
    outcome = subprocess.run(
        list(command), check=False, capture_output=True, text=True, timeout=_SECONDS
    )
    if outcome.returncode:
        raise MakeImageError(f"{command[0]} failed:\n{outcome.stderr[-2000:]}")
