"""Downloads and unpacks Debian or Ubuntu packages without installing them and without root."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imagecache.errors import Denied, NoSpace, NotFound, Unavailable, Unsupported

_DEADLINE_SECONDS: Final = 600
_KERNEL_PART = re.compile(r"linux-(image|modules|modules-extra)-[0-9][A-Za-z0-9.+~-]*")


@dataclass(frozen=True, slots=True)
class GuestPackages:
    """What a distribution calls the packages a guest is made of."""

    kernel: str
    busybox: str = "busybox-static"


def machine() -> str:
    """This host's architecture in QEMU's words: x86_64 or aarch64; raises Unsupported."""
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if name not in ("x86_64", "aarch64"):
        raise Unsupported(f"guests run on x86_64 and aarch64 hosts, and this one is {name}")
    return name


def packages_for_host(os_release: Path = Path("/etc/os-release")) -> GuestPackages:
    """The package names of this host's distribution; raises Unsupported for others by name."""
    fields: dict[str, str] = {}
    if os_release.is_file():
        for line in os_release.read_text(errors="replace").splitlines():
            key, equals, value = line.partition("=")
            if equals:
                fields[key] = value.strip("\"'")
    distribution = fields.get("ID", "unknown")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        distribution = f"{distribution}, without apt-get and dpkg-deb"
    if distribution == "debian":
        suffix = "amd64" if machine() == "x86_64" else "arm64"
        return GuestPackages(kernel=f"linux-image-cloud-{suffix}")
    if distribution == "ubuntu":
        return GuestPackages(kernel="linux-image-virtual")
    raise Unsupported(
        f"guest kernels are made from Debian's or Ubuntu's packages; this host is {distribution}",
        remedy="give a kernel and initramfs of your own with --kernel and --initrd",
    )


class Downloader:
    """`apt-get download` with the host's sources; with private package lists where the host's are
    missing or stale, so that nothing outside `work` changes and no root is needed.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._private: tuple[str, ...] = ()

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """The .deb files of these packages; raises NotFound, Unavailable, NoSpace."""
        target = self._work / "debs"
        target.mkdir(parents=True, exist_ok=True)
        result = self._apt("apt-get", "download", *names, directory=target)
        if result.returncode != 0 and not self._private:
            self._refresh()
            result = self._apt("apt-get", "download", *names, directory=target)
        if result.returncode != 0:
            raise _failure(f"cannot download {' '.join(names)}", result.stderr)
        found = [path for name in names for path in target.glob(f"{name}_*.deb")]
        if len(found) < len(names):
            raise NotFound(f"apt-get downloaded {len(found)} of {len(names)} packages")
        return found

    def kernel_parts(self, package: str) -> list[str]:
        """The versioned packages behind a kernel's meta package, its modules included."""
        parts: list[str] = []
        waiting = [package]
        while waiting:
            for name in self._depends(waiting.pop()):
                if _KERNEL_PART.fullmatch(name) and name not in parts:
                    parts.append(name)
                    waiting.append(name)
        if not parts:
            raise NotFound(
                f"the package sources offer no {package}", remedy="apt-get update, or --kernel FILE"
            )
        return parts

    def closure(self, package: str) -> list[str]:
        """The real packages that `package` needs, and theirs in turn; raises Unavailable."""
        words = ("--recurse", "--important", "--no-conflicts", "--no-breaks", "--no-replaces")
        result = self._apt("apt-cache", "depends", *words, package, directory=self._work)
        if result.returncode != 0 and not self._private:
            self._refresh()
            result = self._apt("apt-cache", "depends", *words, package, directory=self._work)
        if result.returncode != 0:
            raise _failure(f"the package sources do not know {package}", result.stderr)
        names = re.findall(r"^([a-z0-9][a-z0-9+.-]*)$", result.stdout, re.MULTILINE)
        return sorted(set(names) - {package})

    def _depends(self, name: str) -> list[str]:
        result = self._apt("apt-cache", "depends", "--important", name, directory=self._work)
        if result.returncode != 0 and not self._private:
            self._refresh()
            result = self._apt("apt-cache", "depends", "--important", name, directory=self._work)
        if result.returncode != 0:
            raise _failure(f"the package sources do not know {name}", result.stderr)
        return re.findall(r"^ *\|?Depends: (\S+)$", result.stdout, re.MULTILINE)

    def _refresh(self) -> None:
        lists, cache = self._work / "lists", self._work / "archives"
        for directory in (lists / "partial", cache / "archives" / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        self._private = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}")
        result = self._apt("apt-get", "update", directory=self._work)
        if result.returncode != 0:
            raise _failure("cannot read the package sources", result.stderr)

    def _apt(self, program: str, *words: str, directory: Path) -> subprocess.CompletedProcess[str]:
        command = [program, *self._private, "-q"]
        if os.geteuid() == 0:
            # apt's own user cannot write in a private directory, and would warn about it.
            command += ["-o", "APT::Sandbox::User=root"]
        try:
            return subprocess.run(
                [*command, *words],
                cwd=directory,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_DEADLINE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"{program} did not finish in {_DEADLINE_SECONDS} seconds",
                remedy="check the network and try again",
            ) from error


def unpack(package: Path, target: Path) -> None:
    """Unpacks a .deb without running anything of it; raises Unavailable, NoSpace."""
    target.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        ["dpkg-deb", "-x", str(package), str(target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_DEADLINE_SECONDS,
    )
    if result.returncode != 0:
        raise _failure(f"cannot unpack {package.name}", result.stderr)


def _failure(what: str, stderr: str) -> Unavailable | NoSpace | Denied:
    lines = [line for line in stderr.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "no reason given"
    if "No space left" in stderr:
        return NoSpace(f"{what}: {reason}", remedy="free space in the guest cache's file system")
    if "Permission denied" in stderr:
        return Denied(f"{what}: {reason}", remedy="set CUBECACHE_CACHE_DIR to a writable directory")
    return Unavailable(f"{what}: {reason}", remedy="check the network and apt's sources")
