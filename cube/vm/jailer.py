"""Firecracker's jailer: its options, the jail it makes, and what must be removed after it.

From docs/jailer.md of Firecracker's repository: the jail is BASE/PROGRAM/ID/root, the jailer makes
it unless it is there, gives it to uid:gid, changes its root and directory to it, and becomes
`./PROGRAM --id=ID` with what stands after `--`; nothing is removed by it. Without `--daemonize` and
`--new-pid-ns` the process stays the one that was started.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from imagecache.errors import Denied, NoSpace, UsageError

ID_LIMIT: Final = 64
_ID = re.compile(r"[A-Za-z0-9-]+")
_CGROUP_FILE = re.compile(r"[a-z0-9_]+\.[a-z0-9_.]+", re.ASCII)
_PARENT = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
_RESOURCES: Final = ("fsize", "no-file")


@dataclass(frozen=True, slots=True)
class Jailer:
    """How machines are jailed. `cgroups` are files and values of each machine's own group."""

    program: Path
    uid: int
    gid: int
    chroot_base: Path = Path("/srv/jailer")
    cgroup_version: int = 2
    parent_cgroup: str = ""  # the program's name, where it is not given
    cgroups: Mapping[str, str] = field(default_factory=dict)
    cgroup_root: Path = Path("/sys/fs/cgroup")  # where the hierarchies are mounted
    netns: Path | None = None
    limits: Mapping[str, int] = field(default_factory=dict)  # fsize, no-file

    def check(self) -> None:
        """Raises UsageError naming the option, Denied for a caller who is not root."""
        if self.uid <= 0 or self.gid <= 0:
            raise UsageError(f"a jail's uid {self.uid} and gid {self.gid} must not be root's")
        if self.cgroup_version not in (1, 2):
            raise UsageError(f"there is no cgroup version {self.cgroup_version}")
        if self.parent_cgroup and (
            not _PARENT.fullmatch(self.parent_cgroup) or ".." in self.parent_cgroup.split("/")
        ):
            raise UsageError(f"parent cgroup {self.parent_cgroup!r} is no relative path")
        for name, value in self.cgroups.items():
            if not _CGROUP_FILE.fullmatch(name) or not value or "\n" in value or "\0" in value:
                raise UsageError(f"cgroup setting {name}={value!r} is not FILE=VALUE")
        for name, limit in self.limits.items():
            if name not in _RESOURCES or limit <= 0:
                raise UsageError(f"a jail has no limit {name}={limit}")
        if os.geteuid() != 0:
            raise Denied(
                "only root makes jails", remedy="run the keeper as root, or without a jail"
            )


@dataclass(frozen=True, slots=True)
class Jail:
    """One machine's jail."""

    jailer: Jailer
    program: Path
    name: str

    @property
    def base(self) -> Path:
        """What is removed in the end."""
        return self.jailer.chroot_base / self.program.name / self.name

    @property
    def root(self) -> Path:
        """The directory that Firecracker sees as /."""
        return self.base / "root"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The words that start Firecracker in it."""
        jailer = self.jailer
        words = [str(jailer.program), "--id", self.name, "--exec-file", str(self.program)]
        words += ["--uid", str(jailer.uid), "--gid", str(jailer.gid)]
        words += ["--cgroup-version", str(jailer.cgroup_version)]
        for name, value in jailer.cgroups.items():
            words += ["--cgroup", f"{name}={value}"]
        if jailer.parent_cgroup:
            words += ["--parent-cgroup", jailer.parent_cgroup]
        words += ["--chroot-base-dir", str(jailer.chroot_base)]
        if jailer.netns is not None:
            words += ["--netns", str(jailer.netns)]
        for name, limit in jailer.limits.items():
            words += ["--resource-limit", f"{name}={limit}"]
        return [*words, "--", *arguments]

    def make(self) -> None:
        """An empty root, a jail of an earlier machine of this name removed; NoSpace."""
        try:
            self.remove()
            self.root.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise NoSpace(f"jail {self.root} cannot be made: {error.strerror}") from error

    def bring(self, source: Path) -> str:
        """Puts a file into it, by a link where that works; its name there."""
        inside = self.root / source.name
        try:
            try:
                if not source.stat().st_mode & stat.S_IROTH:
                    raise PermissionError  # a link would be as unreadable to the jailed user
                inside.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, inside)
                inside.chmod(0o444)
        except OSError as error:
            raise NoSpace(f"{source} cannot be put into the jail: {error.strerror}") from error
        return source.name

    def give(self, path: Path) -> None:
        """Makes something in it the jailed user's."""
        os.chown(path, self.jailer.uid, self.jailer.gid, follow_symlinks=False)

    def groups(self) -> list[Path]:
        """The control groups that the jailer makes for this machine alone."""
        jailer = self.jailer
        if not jailer.cgroups:
            return []
        inside = Path(jailer.parent_cgroup or self.program.name) / self.name
        if jailer.cgroup_version == 2:
            return [jailer.cgroup_root / inside]
        names = {name.partition(".")[0] for name in jailer.cgroups}
        return [jailer.cgroup_root / name / inside for name in sorted(names)]

    def remove(self) -> None:
        """Removes it and its control groups, once nothing runs in it."""
        shutil.rmtree(self.base, ignore_errors=True)
        for group in self.groups():
            with contextlib.suppress(OSError):
                group.rmdir()


def jail_name(machine: str) -> str:
    """An id that the jailer takes, from a name that tells machines apart."""
    return "-".join(_ID.findall(machine))[-ID_LIMIT:].strip("-") or "machine"
