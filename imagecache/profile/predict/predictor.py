"""From an image's run configuration to the files that its start will read."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from imagecache.chunks import BLOCK
from imagecache.errors import CubecacheError, NotFound, Rejected
from imagecache.flatten import kinds
from imagecache.imageview import FileSpan, ImageView
from imagecache.profile.predict import linker, python
from imagecache.profile.predict.elf import Elf, read_elf
from imagecache.profile.profile import Profile, Touch

T = TypeVar("T")
ReadDisk = Callable[[int, int], Awaitable[bytes]]
"""Verified bytes of the disk: (offset, length)."""

_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_DEPTH = 4
_MAX_LIBRARIES = 1024
_MAX_READ_BYTES = 256 << 20
_AT_ONCE = 16
_SMALL_FILE = 8 << 20
_HEAD_BYTES = 1 << 20  # of a large program or library


@dataclass(frozen=True, slots=True)
class Program:
    """What an image runs; texts as its config has them."""

    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    working_directory: str

    def variable(self, name: str) -> bytes:
        """The value of an environment variable, empty where it is not set."""
        for text in self.environment:
            key, _, value = text.partition("=")
            if key == name:
                return value.encode(errors="surrogateescape")
        return b""


@dataclass(slots=True)
class _Budget:
    bytes_left: int = _MAX_READ_BYTES


@dataclass(slots=True)
class Predictor:
    """One prediction: what was found, in the order of loading. Use `predict`."""

    view: ImageView
    read: ReadDisk
    program: Program
    touched: dict[bytes, list[tuple[int, int]]] = field(default_factory=dict)
    _real: dict[bytes, FileSpan | None] = field(default_factory=dict)
    _elves: dict[bytes, Elf | None] = field(default_factory=dict)
    _budget: _Budget = field(default_factory=_Budget)
    _configured: list[bytes] | None = None

    async def run(self) -> None:
        """Follows the program; what cannot be read or understood ends a branch, not the whole."""
        arguments = [text.encode(errors="surrogateescape") for text in self.program.arguments]
        if arguments:
            await self._start(arguments, 0)

    # --- files

    def span(self, path: bytes) -> FileSpan | None:
        """The regular file at a path, symlinks followed; None where there is none."""
        if path not in self._real:
            try:
                real, node = self.view.resolve(path)
            except NotFound:
                self._real[path] = None
            else:
                regular = node.kind == kinds.REGULAR
                self._real[path] = self.view.span(real, node) if regular else None
        return self._real[path]

    def modified(self, path: bytes) -> int:
        """A file's modification time in seconds."""
        node = self.view.tree.lookup(path)
        return 0 if node is None else self.view.tables[node.layer].mtime[node.inode]

    def touch(self, span: FileSpan, parts: Iterable[tuple[int, int]] | None = None) -> None:
        """The start reads these (offset, length) of a file, or all of it."""
        if span.size and span.path not in self.touched:
            self.touched[span.path] = list(parts) if parts is not None else [(0, span.size)]

    async def content(self, span: FileSpan, offset: int, length: int) -> bytes:
        """Bytes of a file, fewer at its end; Rejected when the prediction has read enough."""
        length = max(0, min(length, span.size - offset))
        if not length:
            return b""
        self._budget.bytes_left -= length
        if self._budget.bytes_left < 0:
            raise Rejected("the prediction has read enough")
        return await self.read(span.offset + offset, length)

    # --- programs

    async def _start(self, arguments: Sequence[bytes], depth: int) -> None:
        if depth > _MAX_DEPTH:
            return
        span = self._find_program(arguments[0])
        if span is None:
            return
        head = await self.content(span, 0, 256)
        if head.startswith(b"#!"):
            self.touch(span)
            words = head.partition(b"\n")[0][2:].split(None, 1)
            if words:
                await self._start([*words, b"/" + span.path, *arguments[1:]], depth + 1)
            return
        if not head.startswith(b"\x7fELF"):
            self.touch(span)
            return
        await self.load_library(span)
        real = span.path.rpartition(b"/")[2]
        version = python.version_of(real)
        if real in (b"env", b"coreutils") and len(arguments) > 1:
            rest = [word for word in arguments[1:] if b"=" not in word and word[:1] != b"-"]
            if rest:
                await self._start(rest, depth + 1)
        elif version is not None:
            await self._python(span, version, arguments[1:])
        else:
            await self._arguments(arguments[1:], depth)

    async def _arguments(self, arguments: Sequence[bytes], depth: int) -> None:
        """What another program is given: files that it reads, and a command that it starts.

        `sh /docker-entrypoint.sh nginx -g ...` ends in the command that the script was given.
        """
        for number, argument in enumerate(arguments[:64]):
            if argument.startswith(b"-") or len(argument) > 4096:
                continue
            span = self.span(self._absolute(argument))
            if span is not None:
                self.touch(span)
            elif b"/" not in argument and self._find_program(argument) is not None:
                await self._start(arguments[number:], depth + 1)
                return

    def _absolute(self, path: bytes) -> bytes:
        base = self.program.working_directory.encode(errors="surrogateescape") or b"/"
        return linker.normal(posixpath.join(base, path))

    def _find_program(self, name: bytes) -> FileSpan | None:
        if b"/" in name:
            return self.span(self._absolute(name))
        for directory in (self.program.variable("PATH") or _PATH).split(b":")[:64]:
            span = self.span(linker.normal(directory + b"/" + name))
            if span is not None:
                return span
        return None

    # --- ELF

    async def _elf(self, span: FileSpan) -> Elf | None:
        if span.path not in self._elves:
            steps = read_elf()
            try:
                wanted = next(steps)
                while True:
                    wanted = steps.send(await self.content(span, *wanted))
            except StopIteration as end:
                self._elves[span.path] = end.value
            except CubecacheError:
                self._elves[span.path] = None
        return self._elves[span.path]

    def _touch_elf(self, span: FileSpan, elf: Elf) -> None:
        if span.size <= _SMALL_FILE:
            self.touch(span)
            return
        parts = [(0, _HEAD_BYTES)]
        parts += [(x.offset, x.length) for x in elf.segments if x.writable]
        self.touch(span, parts)

    async def load_library(self, span: FileSpan) -> None:
        """A program or library with everything that it needs, breadth first as ld.so does."""
        elf = await self._elf(span)
        if elf is None:
            return
        self._touch_elf(span, elf)
        if elf.interpreter:
            interpreter = self.span(linker.normal(elf.interpreter))
            if interpreter is not None:
                self.touch(interpreter)
            cache = self.span(b"etc/ld.so.cache")
            if cache is not None:
                self.touch(cache)
        configured = await self._configuration()
        extra = [part for part in self.program.variable("LD_LIBRARY_PATH").split(b":") if part]
        level: list[tuple[FileSpan, Elf, tuple[bytes, ...]]] = [(span, elf, ())]
        seen: set[bytes] = {span.path}
        while level and len(seen) < _MAX_LIBRARIES:
            found: dict[bytes, tuple[FileSpan, tuple[bytes, ...]]] = {}
            for above, its, rpath in level:
                inherited = (*(linker.expanded(x, above.path) for x in its.rpath), *rpath)
                for name in its.needed:
                    library = self._library(name, its, above.path, extra, configured, rpath)
                    if library is not None and library.path not in seen:
                        found.setdefault(library.path, (library, inherited))
            seen.update(found)
            spans = [library for library, _ in found.values()]
            elves = await _some([self._elf(library) for library in spans])
            level = []
            for (library, rpath), its_elf in zip(found.values(), elves, strict=True):
                if its_elf is not None:
                    self._touch_elf(library, its_elf)
                    level.append((library, its_elf, rpath))

    def _library(  # noqa: PLR0917 - one search, with what it depends on
        self,
        name: bytes,
        elf: Elf,
        path: bytes,
        extra: Sequence[bytes],
        configured: Sequence[bytes],
        rpath: Sequence[bytes],
    ) -> FileSpan | None:
        for candidate in linker.candidates(
            name, elf, path, environment=extra, configured=configured, inherited_rpath=rpath
        ):
            span = self.span(candidate)
            if span is not None:
                return span
        return None

    async def _configuration(self) -> list[bytes]:
        if self._configured is None:
            self._configured = []
            paths = [linker.CONFIG]
            node = self.view.tree.lookup(linker.CONFIG_DIRECTORY)
            if node is not None and node.directory is not None:
                names = sorted(node.directory.children)[: linker.MAX_DIRECTORIES]
                paths += [linker.CONFIG_DIRECTORY + b"/" + n for n in names if n.endswith(b".conf")]
            spans = [span for path in paths if (span := self.span(path)) is not None]
            texts = await _some([self.content(span, 0, 64 << 10) for span in spans])
            self._configured = linker.configured_directories(texts)
        return self._configured

    # --- Python

    async def _python(
        self, interpreter: FileSpan, version: tuple[int, int | None], arguments: Sequence[bytes]
    ) -> None:
        full = self._python_version(interpreter, version)
        if full is None:
            return
        root = interpreter.path.rpartition(b"/")[0].rpartition(b"/")[0]
        script, module, inline = _python_program(arguments)
        directory = self._absolute(b"")
        source: FileSpan | None = None
        if script:
            source = self.span(self._absolute(script))
            directory = self._absolute(script).rpartition(b"/")[0]
        extra = [part for part in self.program.variable("PYTHONPATH").split(b":") if part]
        places = [
            place
            for place in python.search_path(root, full, directory, extra)
            if (node := self.view.tree.lookup(self._followed(place))) is not None
            and node.directory is not None
        ]
        search = _Modules(self, places, full)
        await search.load(python.START_UP)
        if module:
            await search.load([module, module + b".__main__"])
        if source is not None:
            self.touch(source)
            text = await self.content(source, 0, python.MAX_SOURCE)
            await search.load(search.wanted_by(text, b""))
        if inline:
            await search.load(search.wanted_by(inline.replace(b";", b"\n"), b""))

    def _followed(self, path: bytes) -> bytes:
        try:
            return self.view.resolve(path)[0]
        except NotFound:
            return path

    def _python_version(
        self, interpreter: FileSpan, version: tuple[int, int | None]
    ) -> tuple[int, int] | None:
        if version[1] is not None:
            return version[0], version[1]
        root = interpreter.path.rpartition(b"/")[0].rpartition(b"/")[0]
        node = self.view.tree.lookup(root + b"/lib")
        names = node.directory.children if node is not None and node.directory is not None else {}
        found = [v for name in names if (v := python.version_of(name)) is not None and v[1]]
        newest = max(found, default=None)
        return None if newest is None or newest[1] is None else (newest[0], newest[1])


class _Modules:
    """Imports followed through a search path, each module once."""

    def __init__(
        self, predictor: Predictor, places: Sequence[bytes], version: tuple[int, int]
    ) -> None:
        self._predictor = predictor
        self._places = places
        self._version = version
        self._known: set[bytes] = set()
        self._home: dict[bytes, list[bytes]] = {}

    def wanted_by(self, source: bytes, package: bytes) -> list[bytes]:
        return [
            name for found in python.imports_of(source) for name in python.absolute(found, package)
        ]

    async def load(self, modules: Iterable[bytes]) -> None:
        level = list(dict.fromkeys(modules))
        while level and len(self._known) < python.MAX_MODULES:
            level = [name for name in level if name not in self._known]
            self._known.update(level)
            deeper = await _some([self._one(name) for name in level])
            level = list(dict.fromkeys(name for names in deeper for name in names))

    async def _one(self, module: bytes) -> list[bytes]:
        predictor = self._predictor
        for place in self._homes(module):
            for path in python.files_of(module, place):
                span = predictor.span(path)
                if span is None:
                    continue
                code = predictor.span(python.compiled(span.path, self._version))
                if code is not None:
                    predictor.touch(code)
                head = await predictor.content(code, 0, 16) if code is not None else b""
                if not python.is_current(head, predictor.modified(span.path), span.size):
                    predictor.touch(span)
                text = await predictor.content(span, 0, python.MAX_SOURCE)
                is_package = path.endswith(b"/__init__.py")
                package = module if is_package else module.rpartition(b".")[0]
                return self.wanted_by(text, package)
            extension = self._extension(module, place)
            if extension is not None:
                await predictor.load_library(extension)
                return []
        return []

    def _homes(self, module: bytes) -> Sequence[bytes]:
        """Where a module is looked for: a package's modules stand where the package does."""
        top, dot, _ = module.partition(b".")
        if not dot:
            return self._places
        if top not in self._home:
            package = (top + b"/__init__.py", top + b".py")
            self._home[top] = [
                place
                for place in self._places
                if any(self._predictor.span(place + b"/" + name) for name in package)
            ][:1] or list(self._places)
        return self._home[top]

    def _extension(self, module: bytes, place: bytes) -> FileSpan | None:
        base = place + b"/" + module.replace(b".", b"/")
        for triplet in (b"x86_64-linux-gnu", b"aarch64-linux-gnu"):
            for suffix in python.extension_suffixes(self._version, triplet):
                span = self._predictor.span(base + suffix)
                if span is not None:
                    return span
        return None


def _python_program(arguments: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    """(script, module of -m, text of -c): at most one of them is not empty."""
    words = iter(arguments)
    for word in words:
        if word == b"-m":
            return b"", next(words, b""), b""
        if word == b"-c":
            return b"", b"", next(words, b"")
        if word in (b"-W", b"-X"):
            next(words, None)
        elif not word.startswith(b"-"):
            return word, b"", b""
    return b"", b"", b""


async def _some(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Awaits all, so many at once; in their order."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def placed(job: Awaitable[T]) -> T:
        async with places:
            return await job

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(placed(job)) for job in jobs]
    except ExceptionGroup as failures:
        # The group has ended its other tasks; the first error tells enough.
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def predict(
    view: ImageView, image: str, block_image: bytes, program: Program, read: ReadDisk
) -> Profile:
    """A profile of 0 sources; Unavailable and the like only where nothing at all could be read."""
    predictor = Predictor(view, read, program)
    try:
        await predictor.run()
    except CubecacheError:
        if not predictor.touched:
            raise
    touches = []
    for path, parts in predictor.touched.items():
        for offset, length in parts:
            first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
            if end > first:
                touches.append(Touch(path, first, end - first))
    return Profile(image, block_image, 0, tuple(touches), ())
