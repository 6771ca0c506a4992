"""Root file systems as tars, from the packages of the host's own distribution, made by mmdebstrap.

The host's suite, sources and keyring are used; no mirror is named here. Runs as root or, where user
namespaces with subordinate ids are set up, as any user: mmdebstrap chooses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from imagemaker.entries import EPOCH

# What "slim" images of the distribution leave out.
_EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
)
_FORMAT = 1
# Package scripts and mirrors can hang; `timeout` ends the whole process group.
_DEADLINE = ("timeout", "--signal=KILL", "900")


class MakeImageError(Exception):
    """An image could not be made; the message says which step failed."""


def suite() -> str:
    """The code name of the host's release, such as `bookworm`."""
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip("\"'")
    raise MakeImageError("/etc/os-release names no VERSION_CODENAME")


def host_sources() -> str:
    """The host's package sources for its own suite, in deb822 and one-line form as they were found.

    Third-party sources are left out: they have other suites, and keys that an image need not trust.
    """
    code_name = suite()
    stanzas: list[str] = []
    lines: list[str] = []
    folder = Path("/etc/apt")
    for path in [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]:
        if not path.is_file() or path.suffix not in (".list", ".sources"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".list":
            lines += [
                line for line in text.splitlines() if _is_own_line(line, code_name) is not None
            ]
        else:
            stanzas += [s for s in re.split(r"\n\s*\n", text) if _is_own_stanza(s, code_name)]
    if not stanzas and not lines:
        raise MakeImageError(f"no package source for {code_name} in /etc/apt")
    return "\n\n".join([*stanzas, "\n".join(lines)]).strip() + "\n"


def _is_own_line(line: str, code_name: str) -> str | None:
    match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?\S+\s+(\S+)", line)
    return line if match and match[1].partition("-")[0] == code_name else None


def _is_own_stanza(stanza: str, code_name: str) -> bool:
    match = re.search(r"^Suites:\s*(.+)$", stanza, re.MULTILINE)
    disabled = re.search(r"^Enabled:\s*no\s*$", stanza, re.MULTILINE | re.IGNORECASE)
    if not match or disabled:
        return False
    return match[1].split()[0].partition("-")[0] == code_name


def root_tar(cache: Path, packages: Sequence[str], *, variant: str = "minbase") -> Path:
    """The tar of a root with `packages`, made once per list and release under `cache`.

    Raises `MakeImageError` with the end of mmdebstrap's log.
    """
    identity = json.dumps([_FORMAT, suite(), variant, sorted(packages), EPOCH, _EXCLUDED])
    target = cache / "roots" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial.tar")
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=_sources_suffix(), encoding="utf-8") as sources:
        sources.write(host_sources())
        sources.flush()
        # mmdebstrap's own user reads the file when root drops privileges.
        Path(sources.name).chmod(0o644)
        command = _command(partial, packages, variant, archives, sources.name)
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH), "LC_ALL": "C.UTF-8"}
        for attempt in (1, 2, 3):
            outcome = subprocess.run(
                [*_DEADLINE, *command], check=False, capture_output=True, text=True, env=environment
            )
            if outcome.returncode == 0:
                break
            if attempt == 3:
                partial.unlink(missing_ok=True)
                log = "\n".join(outcome.stderr.splitlines()[-15:])
                raise MakeImageError(
                    f"mmdebstrap failed ({', '.join(packages) or variant}):\n{log}"
                )
    partial.rename(target)
    return target


def _sources_suffix() -> str:
    return ".sources" if "Suites:" in host_sources() else ".list"


def _command(
    target: Path, packages: Sequence[str], variant: str, archives: Path, sources: str
) -> list[str]:
    command = ["mmdebstrap", f"--variant={variant}", "--aptopt=Acquire::Retries 5"]
    command += ['--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    command += [f"--include={','.join(packages)}"] if packages else []
    command += [
        # Downloaded packages are kept between runs, as mmdebstrap's manual shows it.
        "--skip=download/empty",
        "--skip=essential/unlink",
        '--setup-hook=mkdir -p "$1/var/cache/apt/archives"',
        f"--setup-hook=sync-in '{archives}' /var/cache/apt/archives/",
        f"--customize-hook=sync-out /var/cache/apt/archives '{archives}'",
    ]
    if variant != "extract":
        command += [
            # Some packages' scripts put links beside manual pages that are excluded.
            '--essential-hook=mkdir -p "$1/usr/share/man/man1" "$1/etc/postgresql-common"',
            # A database cluster made at installation would carry a random identity.
            "--essential-hook=echo create_main_cluster=false "
            '>"$1/etc/postgresql-common/createcluster.conf"',
        ]
    # The host's own name and resolver do not belong in an image.
    command += ['--customize-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"']
    return [*command, suite(), str(target), sources]


def wheels_tree(cache: Path, requirements: Sequence[str]) -> Path:
    """A folder with `requirements` installed by pip from wheels, made once under `cache`."""
    identity = json.dumps([_FORMAT, suite(), sorted(requirements)])
    target = cache / "wheels" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    command = ["/usr/bin/python3", "-m", "pip"]
    if subprocess.run([*command, "--version"], check=False, capture_output=True).returncode:
        # The distribution's Python has no pip of its own; the venv's is of the same version.
        command = [str(Path(__file__).parents[2] / ".venv/bin/python"), "-m", "pip"]
    command += ["install", "--quiet", "--no-compile", "--only-binary=:all:", "--retries=5"]
    command += ["--target", str(partial), *requirements]
    outcome = subprocess.run([*_DEADLINE, *command], check=False, capture_output=True, text=True)
    if outcome.returncode:
        raise MakeImageError(f"pip failed ({', '.join(requirements)}):\n{outcome.stderr[-2000:]}")
    partial.rename(target)
    return target
