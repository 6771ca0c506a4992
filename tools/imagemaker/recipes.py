"""The images that can be made, by name. A changed recipe gets a new `version`, so caches see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imagemaker.entries import (
    EPOCH,
    Entry,
    access_list,
    capability,
    directory,
    opaque,
    whiteout,
)
from imagemaker.layout import Settings

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Packages:
    """A layer that installs packages over those of the layers below (none for the base)."""

    names: tuple[str, ...] = ()
    variant: str = "minbase"
    compression: str = "gzip"


@dataclass(frozen=True)
class Wheels:
    """A layer that installs Python packages from wheels below `prefix`."""

    requirements: tuple[str, ...]
    prefix: str
    compression: str = "zstd"


@dataclass(frozen=True)
class Written:
    """A layer of entries written by hand."""

    entries: Callable[[], Sequence[Entry]]
    compression: str = "gzip"


@dataclass(frozen=True)
class Recipe:
    """An image: its layers from the bottom up, and how it is run."""

    name: str
    version: int
    layers: tuple[Packages | Wheels | Written, ...]
    settings: Settings


def _python_program(greeting: str) -> Callable[[], Sequence[Entry]]:
    program = f"""import time
import numpy
matrix = numpy.arange(1_000_000, dtype=numpy.float64).reshape(1000, 1000)
print("{greeting}", numpy.__version__, "trace", matrix.trace(), flush=True)
""".encode()
    return lambda: [directory("app"), Entry("app/main.py", content=program)]


def _busybox_base() -> Sequence[Entry]:
    folders = ["dev", "etc", "home", "proc", "root", "run", "sys", "usr", "usr/sbin", "var"]
    users = b"root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/home:/bin/sh\n"
    applets = "ash awk cat chmod cp cut date dd df du echo env false find grep head hostname id"
    applets += " kill ln ls md5sum mkdir mknod mount mv od printf ps pwd readlink rm rmdir sed sh"
    applets += (
        " sha256sum sleep sort stat sync tail tar test touch tr true uname uniq vi wc xargs yes"
    )
    return [
        *(directory(folder) for folder in folders),
        directory("tmp", 0o1777),
        Entry("etc/passwd", content=users),
        Entry("etc/group", content=b"root:x:0:\nwww:x:33:\n"),
        *(
            Entry(f"usr/sbin/{name}", "symlink", 0o777, target="../../bin/busybox")
            for name in applets.split()
        ),
    ]


def _oddities() -> Sequence[Entry]:
    """What real images hold now and then, each once."""
    return [
        directory("odd", 0o2775, uid=1000, gid=2_000_000_000),
        Entry("odd/setuid", mode=0o4755, content=b"#!/bin/sh\nid\n"),
        Entry(
            "odd/capable",
            mode=0o755,
            content=b"x" * 5000,
            xattrs={"security.capability": capability(13)},
        ),
        Entry(
            "odd/shared",
            mode=0o664,
            content=b"shared\n",
            xattrs={"system.posix_acl_access": access_list(6, 4, 4, {1000: 6})},
        ),
        Entry(
            "odd/tagged", content=b"t", xattrs={"user.note": b"\x00\xff binary", "user.empty": b""}
        ),
        Entry("odd/precise", content=b"nanoseconds\n", mtime_ns=EPOCH * 10**9 + 123_456_789),
        Entry("odd/old", content=b"1901\n", mtime_ns=0),
        Entry("odd/far-owner", content=b"o", uid=4_294_967_294, gid=4_294_967_294),
        Entry("odd/name-\udcff\udcfe", content=b"not UTF-8\n"),
        Entry("odd/line\nbreak", content=b"\n"),
        Entry("odd/na\u00efve-\u65e5\u672c", content=b"UTF-8\n"),
        Entry("odd/empty"),
        Entry("odd/zeros", content=bytes(3 << 20)),
        Entry("odd/big", content=b"".join(i.to_bytes(4, "big") for i in range(400_000))),
        Entry("odd/link-a", content=b"linked\n"),
        Entry("odd/link-b", "hardlink", target="odd/link-a"),
        Entry("odd/link-c", "hardlink", target="odd/link-a"),
        Entry("odd/pipe", "fifo", 0o600),
        Entry("odd/null", "char", 0o666, device=(1, 3)),
        Entry("odd/disk", "block", 0o660, device=(259, 1_000_000)),
        Entry("odd/to-nowhere", "symlink", 0o777, target="../../no/such/place"),
        Entry("odd/" + "n" * 255, content=b"longest name\n"),
        directory("crowd"),
        *(Entry(f"crowd/{number:04d}", content=b"%d\n" % number) for number in range(1500)),
        directory("doomed"),
        *(Entry(f"doomed/{number}", content=b"%d\n" % number) for number in range(20)),
        directory("emptied"),
        Entry("emptied/below", content=b"hidden by an opaque marker\n"),
        Entry("removed", content=b"hidden by a whiteout\n"),
        Entry("replaced-by-directory", content=b"file\n"),
        directory("replaced-by-file"),
        Entry("replaced-by-file/child", content=b"child\n"),
    ]


def _removals() -> Sequence[Entry]:
    return [
        # Like a builder's layer, with the folders on the way to what changed.
        directory("odd", 0o2775, uid=1000, gid=2_000_000_000),
        directory("crowd"),
        whiteout("removed"),
        whiteout("doomed"),
        opaque("emptied"),
        directory("emptied", 0o700),
        Entry("emptied/above", content=b"above\n"),
        whiteout("crowd/0007"),
        directory("replaced-by-directory"),
        Entry("replaced-by-directory/inside", content=b"inside\n"),
        Entry("replaced-by-file", content=b"now a file\n"),
        Entry("odd/link-b", content=b"no longer linked\n"),
        Entry("hello.sh", mode=0o755, content=b'#!/bin/sh\necho "hello from busybox"\n'),
    ]


def _program(name: str, text: str) -> Callable[[], Sequence[Entry]]:
    return lambda: [directory("app"), Entry(f"app/{name}", mode=0o755, content=text.encode())]


_BUSYBOX = (Packages(("busybox-static",), variant="extract"), Written(_busybox_base))
_BUSYBOX_RUN = Settings(command=("/bin/busybox", "sh", "/hello.sh"), environment=(_PATH,))
_PYTHON_RUN = Settings(
    command=("python3", "/app/main.py"),
    environment=(_PATH, "LANG=C.UTF-8"),
    working_directory="/app",
)

_ALL = (
    Recipe(
        "static-busybox",
        2,
        (*_BUSYBOX, Written(_oddities, "zstd"), Written(_removals)),
        _BUSYBOX_RUN,
    ),
    Recipe(
        "static-busybox-v2",
        2,
        (
            *_BUSYBOX,
            Written(_oddities, "zstd"),
            Written(lambda: [*_removals(), Entry("version", content=b"2\n")], "none"),
        ),
        _BUSYBOX_RUN,
    ),
    Recipe(
        "python-numpy",
        1,
        (
            Packages(),
            Packages(("python3", "python3-numpy")),
            Written(_python_program("hello from numpy")),
        ),
        _PYTHON_RUN,
    ),
    Recipe(
        "python-numpy-v2",
        1,
        (
            Packages(),
            Packages(("python3", "python3-numpy", "python3-yaml")),
            Written(_python_program("hello again from numpy")),
        ),
        _PYTHON_RUN,
    ),
    # The same packages in another order: two images that differ in nothing a user would notice.
    Recipe(
        "python-numpy-then-yaml",
        1,
        (
            Packages(),
            Packages(("python3",)),
            Packages(("python3-numpy",)),
            Packages(("python3-yaml",)),
        ),
        _PYTHON_RUN,
    ),
    Recipe(
        "python-yaml-then-numpy",
        1,
        (
            Packages(),
            Packages(("python3",)),
            Packages(("python3-yaml",)),
            Packages(("python3-numpy",)),
        ),
        _PYTHON_RUN,
    ),
    Recipe(
        "nginx",
        2,
        (
            Packages(),
            Packages(("nginx-light", "iputils-ping")),
            Written(
                lambda: [
                    *map(directory, ("var", "var/www", "var/www/html")),
                    *map(directory, ("etc", "etc/nginx", "etc/nginx/sites-enabled")),
                    Entry("var/www/html/index.html", content=b"<h1>cubecache</h1>\n"),
                    whiteout("etc/nginx/sites-enabled/default"),
                ]
            ),
        ),
        Settings(command=("nginx", "-g", "daemon off;"), environment=(_PATH,)),
    ),
    Recipe(
        "postgresql",
        1,
        (Packages(), Packages(("postgresql",), compression="zstd")),
        Settings(command=("pg_lsclusters",), environment=(_PATH, "LANG=C.UTF-8"), user="postgres"),
    ),
    Recipe(
        "nodejs",
        1,
        (
            Packages(),
            Packages(("nodejs",)),
            Written(_program("main.js", 'console.log("hello from node", process.version)\n')),
        ),
        Settings(command=("nodejs", "/app/main.js"), environment=(_PATH,)),
    ),
    Recipe(
        "openjdk",
        1,
        (Packages(), Packages(("default-jre-headless",), compression="zstd")),
        Settings(command=("java", "-version"), environment=(_PATH,)),
    ),
    Recipe(
        "redis",
        1,
        (Packages(), Packages(("redis-server", "redis-tools"))),
        Settings(command=("redis-server", "--version"), environment=(_PATH,), user="redis"),
    ),
    Recipe(
        "ruby",
        1,
        (Packages(), Packages(("ruby",), compression="zstd")),
        Settings(command=("ruby", "--version"), environment=(_PATH, "LANG=C.UTF-8")),
    ),
    # git's own commands are one program under more than a hundred hard links and symlinks.
    Recipe(
        "git",
        1,
        (Packages(), Packages(("git", "openssh-client"))),
        Settings(command=("git", "--version"), environment=(_PATH,)),
    ),
    # A guest that attaches its kernel's own nbd devices (tests/nbdserver/test_nbdserver_kernel.py).
    Recipe(
        "nbd-guest",
        1,
        (Packages(), Packages(("python3", "nbd-client"))),
        Settings(command=("python3", "--version"), environment=(_PATH, "LANG=C.UTF-8")),
    ),
    Recipe(
        "torch-cpu",
        1,
        (
            Packages(),
            Packages(("python3",)),
            Wheels(("torch==2.13.0", "numpy"), "opt/wheels"),
            Written(
                _program(
                    "main.py",
                    "import torch\n"
                    "print('hello from torch', torch.__version__)\n"
                    "print(torch.arange(10.0).sum().item())\n",
                )
            ),
        ),
        Settings(
            command=("python3", "/app/main.py"),
            environment=(_PATH, "PYTHONPATH=/opt/wheels"),
        ),
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}
