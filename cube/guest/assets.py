"""The files a guest boots from, made on first use and cached.

The cache holds kernel-MACHINE/ (kernel, chosen modules, busybox), agent-DIGEST/ and
initramfs-DIGEST.cpio. Each is complete when its name exists: it is made beside it and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cube.guest import agent, cpio, tools
from cube.guest.modules import SETS, Module, select_modules
from cube.guest.packages import Downloader, machine, packages_for_host, unpack
from imagecache.errors import Denied, NotFound, Rejected, Unavailable, Unsupported

_LAYOUT: Final = 1  # raise it when the initramfs's contents change without the agent's source
_BOOT_SECTOR: Final = 0x200
_X86_VERSION_POINTER: Final = 0x20E  # offset of the kernel's version string, less 0x200
_HOST_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """What a machine boots. `tsc_khz` is this host's time-stamp counter rate, 0 if unknown."""

    kernel: Path
    initrd: Path
    release: str
    tsc_khz: int


def default_cache(environment: Mapping[str, str]) -> Path:
    """The cache directory: CUBECACHE_CACHE_DIR, the checkout's .cache, or the user's."""
    chosen = environment.get("CUBECACHE_CACHE_DIR")
    if chosen:
        return Path(chosen).absolute() / "guest"
    project = Path(__file__).resolve().parents[2]
    if (project / "pyproject.toml").is_file() and os.access(project, os.W_OK):
        return project / ".cache" / "guest"
    home = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "/")) / ".cache")
    return Path(home) / "cubecache" / "guest"


def ensure_guest(
    cache: Path, *, kernel: Path | None = None, initrd: Path | None = None, refresh: bool = False
) -> GuestFiles:
    """Kernel and initramfs, made if they are missing; blocking, may take a minute the first time.

    `kernel` replaces the distribution's: its modules come from /lib/modules/RELEASE where the host
    has them, else it must have virtio, EROFS and overlay built in. `initrd` replaces ours whole.
    Raises NotFound, Unavailable, Unsupported, NoSpace, Denied, Rejected.
    """
    for given in (kernel, initrd):
        if given is not None and not given.is_file():
            raise NotFound(f"guest file {given} does not exist or is not a file")
    with _locked(cache):
        built = agent.build(cache)
        khz = _tsc_khz(cache, built / "tsc-khz")
        if kernel is not None:
            release = kernel_release(kernel)
            image = initrd or _own_kernel_initramfs(cache, built, release)
            return GuestFiles(kernel.absolute(), image.absolute(), release, khz)
        parts = cache / f"kernel-{machine()}"
        if refresh or not _has_all_sets(parts):
            _make_kernel(cache, parts)
        release = str(json.loads((parts / "parts.json").read_text())["release"])
        image = initrd or _cached_initramfs(cache, built, parts, release)
        return GuestFiles(parts / "vmlinuz", image.absolute(), release, khz)


def _has_all_sets(parts: Path) -> bool:
    """Whether the kernel there was unpacked with today's choice of modules."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = json.loads((parts / "parts.json").read_text())
        return bool(known.get("sets") == _wanted_sets())
    return False


def _wanted_sets() -> dict[str, list[str]]:
    return {name: list(modules) for name, modules in SETS.items()}


def ensure_tools(cache: Path) -> Path:
    """The tools disk (s3fs), made if it is missing; blocking, downloads the first time.

    Raises NotFound, Unavailable, Unsupported, NoSpace, Denied.
    """
    with _locked(cache):
        return tools.make_tools(cache)


def kernel_release(kernel: Path) -> str:
    """The release string inside a bzImage, or "unknown" for other kinds of kernel."""
    with kernel.open("rb") as file:
        head = file.read(65536)
    if head[0x202:0x206] != b"HdrS":
        return "unknown"
    at = int.from_bytes(head[_X86_VERSION_POINTER : _X86_VERSION_POINTER + 2], "little")
    version = head[at + _BOOT_SECTOR : at + _BOOT_SECTOR + 128].split(b"\0")[0]
    release = version.split(b" ")[0].decode("ascii", "replace")
    # It becomes part of a path below /lib/modules.
    return release if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]*", release) else "unknown"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "lock").open("a")
    except OSError as error:
        raise Denied(
            f"guest cache {cache} cannot be written: {error.strerror}",
            remedy="set CUBECACHE_CACHE_DIR to a writable directory",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tsc_khz(cache: Path, program: Path) -> int:
    """Measured once per boot of this host: the counter's rate can change with the machine."""
    boot = _HOST_BOOT_ID.read_text().strip() if _HOST_BOOT_ID.is_file() else "unknown"
    record = cache / "tsc.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_text())
        if known["boot"] == boot:
            return int(known["khz"])
    try:
        result = subprocess.run(
            [str(program)], capture_output=True, text=True, check=True, timeout=10
        )
        khz = int(result.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the host's clock cannot be measured: {error}") from error
    fresh = record.with_suffix(".new")
    fresh.write_text(json.dumps({"boot": boot, "khz": khz}))
    fresh.replace(record)
    return khz


def _make_kernel(cache: Path, target: Path) -> None:
    names = packages_for_host()
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=cache) as name:
        work = Path(name)
        downloader = Downloader(work)
        tree = work / "tree"
        parts = downloader.kernel_parts(names.kernel)
        basic = [part for part in parts if not part.startswith("linux-modules-extra-")]
        for package in downloader.fetch([*basic, names.busybox]):
            unpack(package, tree)
        modules_directory = _modules_directory(tree)
        modules, missing = select_modules(modules_directory)
        extra = [part.replace("-image-", "-modules-extra-") for part in basic if "-image-" in part]
        if missing and names.kernel == "linux-image-virtual":
            # Ubuntu keeps less common file systems in a package of their own.
            for package in downloader.fetch(extra):
                unpack(package, tree)
            modules, missing = select_modules(modules_directory)
        if missing:
            raise Unsupported(
                f"{names.kernel} has no {', '.join(missing)}", remedy="give another with --kernel"
            )
        release = modules_directory.name
        kernel = tree / "boot" / f"vmlinuz-{release}"
        busybox = next(
            (path for path in (tree / "bin/busybox", tree / "usr/bin/busybox") if path.is_file()),
            None,
        )
        if not kernel.is_file() or busybox is None:
            raise Rejected(f"{names.kernel} or {names.busybox} does not hold what it should")
        fresh = work / "kernel"
        (fresh / "modules").mkdir(parents=True)
        shutil.copyfile(kernel, fresh / "vmlinuz")
        shutil.copyfile(busybox, fresh / "busybox")
        for module in modules:
            (fresh / "modules" / module.file).write_bytes(module.image)
        order = [[module.set, module.file] for module in modules]
        (fresh / "parts.json").write_text(
            json.dumps({"release": release, "modules": order, "sets": _wanted_sets()})
        )
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def _modules_directory(tree: Path) -> Path:
    for base in (tree / "lib/modules", tree / "usr/lib/modules"):
        if base.is_dir() and not base.is_symlink():
            releases = sorted(path for path in base.iterdir() if (path / "kernel").is_dir())
            if releases:
                return releases[-1]
    raise Rejected("the kernel package holds no modules")


def _cached_initramfs(cache: Path, built: Path, parts: Path, release: str) -> Path:
    key = hashlib.sha256(f"{_LAYOUT} {release} {built.name}".encode()).hexdigest()[:16]
    target = cache / f"initramfs-{key}.cpio"
    if not target.is_file() or target.stat().st_mtime < (parts / "parts.json").stat().st_mtime:
        order = json.loads((parts / "parts.json").read_text())["modules"]
        modules = [
            Module(set_name, file, (parts / "modules" / file).read_bytes())
            for set_name, file in order
        ]
        busybox = (parts / "busybox").read_bytes()
        _write(target, initramfs((built / "cube-agent").read_bytes(), modules, busybox))
        # Only the newest is of use; older ones belong to older agents.
        for old in cache.glob("initramfs-*.cpio"):
            if old != target:
                old.unlink(missing_ok=True)
    return target


def _own_kernel_initramfs(cache: Path, built: Path, release: str) -> Path:
    modules: list[Module] = []
    tree = Path("/lib/modules") / release
    if release != "unknown" and (tree / "kernel").is_dir():
        modules, _missing = select_modules(tree)
    archive = initramfs((built / "cube-agent").read_bytes(), modules, None)
    target = cache / f"own-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not target.is_file():
        _write(target, archive)
    return target


def initramfs(init: bytes, modules: list[Module], busybox: bytes | None) -> bytes:
    """The archive a guest starts from: the agent as /init, modules, busybox for debugging."""
    entries = [
        cpio.directory("dev"),
        cpio.character_device("dev/console", 5, 1),
        cpio.program("init", init),
    ]
    if modules:
        load = "".join(f"{module.set} {module.file}\n" for module in modules)
        entries += [cpio.directory("modules"), cpio.plain("modules/load", load.encode())]
        entries += [cpio.plain(f"modules/{module.file}", module.image) for module in modules]
    if busybox is not None:
        entries += [cpio.directory("sbin"), cpio.program("sbin/busybox", busybox)]
    return cpio.archive(entries)


def _write(target: Path, content: bytes) -> None:
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
