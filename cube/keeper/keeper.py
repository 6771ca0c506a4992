"""All pods of one state directory: their record, their tasks, the daemon they need."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import subprocess
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from cube.guest import assets
from cube.guest.assets import ensure_guest
from cube.keeper.orphans import Orphan, find_orphans
from cube.keeper.placing import FIRECRACKER, Equipment, check_firecracker_pod
from cube.keeper.podlife import PodLife
from cube.keeper.record import PodRow, Record
from cube.keeper.status import PodStatus, first_status
from cube.pod.model import BlockVolume, Pod
from cube.vm.firecracker_host import choose_firecracker, find_firecracker
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from imagecache.errors import Busy, CubecacheError, LimitExceeded, NotFound
from imagecache.session import Settings
from preload.client import Client, answers, connect, start_daemon

_LOG = logging.getLogger("cube.keeper")
T = TypeVar("T")
POD_LIMIT: Final = 1000
_DAEMON_SECONDS: Final = 2.0
WATCHER_LIMIT: Final = 100
_QUIET_SECONDS: Final = 5.0
_UID_LENGTH: Final = 12
_END_SECONDS: Final = 120.0


class Keeper:
    """Keeps the pods of one state directory; `open` first, `close` last."""

    def __init__(self, settings: Settings, cache: Path) -> None:
        self._settings = settings
        self._cache = cache
        self._record = Record(settings.state_dir / "pods.sqlite")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._lives: dict[str, PodLife] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dirty: dict[str, PodLife] = {}
        self._flushing: asyncio.Task[None] | None = None
        self._version = 0
        self._news = asyncio.Condition()
        self._stack = contextlib.AsyncExitStack()
        self._client: Client | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._daemon_lock = asyncio.Lock()
        self._equipment: dict[str, asyncio.Task[Equipment]] = {}
        self._tools: asyncio.Task[Path] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._watchers = 0
        # A lock is there as long as somebody holds it or waits for it.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._boots = asyncio.Semaphore(2 * (os.cpu_count() or 1))

    @property
    def state(self) -> Path:
        """The state directory."""
        return self._settings.state_dir

    @property
    def boots(self) -> asyncio.Semaphore:
        """So many machines boot at a time."""
        return self._boots

    # --- begin and end

    async def open(self) -> None:
        """Reads the record and takes up every pod that is not over."""
        await self._in_writer(self._record.open)
        rows = await self._in_writer(self._record.pods)
        for row in rows:
            self._version = max(self._version, row.status.version)
            self._lead(row)
        self._watching = asyncio.create_task(self._watch_daemon())

    async def close(self) -> None:
        """Leaves machines running and lets go of everything else."""
        tasks = [*self._tasks.values()]
        singles = (self._watching, self._tools, *self._equipment.values())
        tasks += [task for task in singles if task is not None]  # type: ignore[misc]  # of several kinds
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._flushing is not None:
            await asyncio.wait({self._flushing})
        await self._in_writer(self._record.close)
        self._writer.shutdown()
        await self._stack.aclose()

    def _lead(self, row: PodRow) -> PodLife:
        life = PodLife(self, row)
        self._lives[row.pod.key] = life
        if row.stopped or (row.machine is None and row.status.phase in ("Succeeded", "Failed")):
            life.over.set()
        else:
            self._tasks[row.pod.key] = asyncio.create_task(life.run())
        return life

    # --- pods

    async def apply(self, pod: Pod) -> PodStatus:
        """Makes the pod be: starts a new one, changes one that is another, leaves one as it is."""
        async with self._alone(pod.key):
            return await self._apply(pod)

    async def _apply(self, pod: Pod) -> PodStatus:
        life = self._lives.get(pod.key)
        if life is not None and life.pod == pod and not life.stopped:
            return life.status
        await self.check_driver(pod)  # before anything is ended for it
        if life is not None:
            await self._end(life)
            uid, created = life.status.uid, life.status.created
        else:
            if len(self._lives) >= POD_LIMIT:
                raise LimitExceeded(f"there are {POD_LIMIT} pods on this host already")
            uid, created = uuid.uuid4().hex[:_UID_LENGTH], time.time()
        status = first_status(pod, uid, created)
        status.directory = str(self.state / "pods" / uid)
        life = self._lead(PodRow(pod, status))
        self.changed(life)
        await self._flushed()
        return status

    def get(self, key: str) -> PodLife:
        """A pod's life; NotFound."""
        life = self._lives.get(key)
        if life is None:
            raise NotFound(f"there is no pod {key!r}", remedy="cubecache pod list")
        return life

    def statuses(self) -> list[PodStatus]:
        """Every pod, in the order of their making."""
        return [life.status for life in self._lives.values()]

    async def stop(self, key: str, grace_seconds: float | None) -> PodStatus:
        """Ends a pod's machine and keeps the pod; `apply` starts it again."""
        async with self._alone(key):
            life = self.get(key)
            life.stopped = True
            await self._end(life, grace_seconds)
            life.status.terminating = False
            self._forget_address(life)
            life.status.settle()
            self.changed(life)
            await self._flushed()
            return life.status

    async def delete(self, key: str, grace_seconds: float | None) -> PodStatus:
        """Ends a pod and forgets it; returns when its machine is gone."""
        async with self._alone(key):
            life = self.get(key)
            life.stopped = True
            await self._end(life, grace_seconds)
            await life.remove_files()
            if self._lives.get(key) is life:
                del self._lives[key]
            await self._flushed()
            await self._in_writer(lambda: self._record.forget(life.status.uid))
            self._version += 1
            life.status.version = self._version
            await self._tell()
            return life.status

    @contextlib.asynccontextmanager
    async def _alone(self, key: str) -> AsyncIterator[None]:
        """One change of a pod at a time."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            yield

    async def _end(self, life: PodLife, grace_seconds: float | None = None) -> None:
        life.stop(grace_seconds)
        grace = life.pod.grace_seconds if grace_seconds is None else grace_seconds
        try:
            await asyncio.wait_for(life.over.wait(), grace + _END_SECONDS)
        except TimeoutError as error:
            raise Busy(f"pod {life.pod.key} does not end") from error
        self._tasks.pop(life.pod.key, None)

    @staticmethod
    def _forget_address(life: PodLife) -> None:
        life.status.address = ""
        for status in life.status.containers:
            status.ready = False

    # --- what pods need

    async def client(self) -> Client:
        """A client of the daemon, started where none answers."""
        async with self._daemon_lock:
            if not await answers(self._settings):
                _LOG.info("starting the cache's daemon")
                if self._daemon is not None:
                    await asyncio.to_thread(self._daemon.poll)  # a zombie is nobody's use
                self._daemon = await start_daemon(self._settings, detached=True)
            if self._client is None:
                self._client = await self._stack.enter_async_context(
                    connect(self._settings, start=False)
                )
            return self._client

    async def equipment(self, driver: str | None) -> Equipment:
        """Driver and guest files; found out once. Unsupported where the driver cannot work."""
        name = driver or "qemu"
        task = self._equipment.get(name)
        if task is None or (task.done() and task.exception() is not None):
            task = asyncio.create_task(self._equip(name))
            self._equipment[name] = task
        return await asyncio.shield(task)

    async def check_driver(self, pod: Pod) -> None:
        """Unsupported where the pod's driver cannot work on this host, or not for this pod."""
        if pod.driver == FIRECRACKER:
            check_firecracker_pod(pod)
            await self.equipment(pod.driver)

    async def tools_disk(self) -> Path:
        """The tools disk; made once."""
        if self._tools is None or (self._tools.done() and self._tools.exception() is not None):
            self._tools = asyncio.create_task(asyncio.to_thread(assets.ensure_tools, self._cache))
        return await asyncio.shield(self._tools)

    async def _equip(self, name: str) -> Equipment:
        if name == FIRECRACKER:
            find_firecracker(os.environ)  # before files are made for nothing
        files = await asyncio.to_thread(ensure_guest, self._cache)
        if name == FIRECRACKER:
            driver = await choose_firecracker(self._cache, files, os.environ)
            return Equipment(driver, files, self._cache)
        return Equipment(QemuDriver(await choose_platform(self._cache, files)), files, self._cache)

    def take_claims(self, life: PodLife) -> None:
        """Busy where another pod with a machine has one of the pod's disks."""
        wanted = _claims(life.pod)
        for other in self._lives.values():
            if other is not life and not other.over.is_set():
                for claim in sorted(wanted & _claims(other.pod)):
                    if other.machine is not None:
                        raise Busy(f"disk {claim!r} is in use by pod {other.pod.key}")

    async def _watch_daemon(self) -> None:
        """Brings a daemon that died back, while machines read from its exports."""
        while True:
            await asyncio.sleep(_DAEMON_SECONDS)
            if any(life.machine is not None for life in self._lives.values()):
                try:
                    await self.client()
                except CubecacheError as error:
                    _LOG.warning("the cache's daemon: %s", error)

    async def orphans(self) -> list[Orphan]:
        """What looks like ours and belongs to no pod: machines, directories, exports."""
        known = {life.status.uid: life for life in self._lives.values()}
        processes = {life.machine.process for life in known.values() if life.machine is not None}
        exports: list[str] = []
        if await answers(self._settings):
            exports = [str(one["name"]) for one in await (await self.client()).exports()]
        return await asyncio.to_thread(
            find_orphans, self.state / "pods", frozenset(known), frozenset(processes), exports
        )

    # --- news

    def changed(self, life: PodLife) -> None:
        """Counts a change up, records it and wakes watchers."""
        self._version += 1
        life.status.version = self._version
        self._dirty[life.status.uid] = life
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A watcher's place; LimitExceeded where there is none."""
        if self._watchers >= WATCHER_LIMIT:
            raise LimitExceeded(f"{WATCHER_LIMIT} watchers are there already")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def watch(self, since: int) -> AsyncIterator[PodStatus | None]:
        """Pods as they change, those changed after `since` first; for ever. Inside `watching`.

        None where nothing has changed for a while: whoever asked may have gone.
        """
        while True:
            # One at a time: while one is written, others change again.
            newer = [x.status for x in self._lives.values() if x.status.version > since]
            if newer:
                status = min(newer, key=lambda status: status.version)
                since = status.version
                yield status
                continue
            version = self._version
            await self.next_change(_QUIET_SECONDS)
            if self._version == version:
                yield None

    async def wait_for(
        self, key: str, until: Callable[[PodStatus], bool], seconds: float
    ) -> PodStatus:
        """The pod's status once it satisfies; what it is when the time is up. NotFound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not until(self.get(key).status):
                    async with self._news:
                        await self._news.wait()
        return self.get(key).status

    async def next_change(self, seconds: float) -> None:
        """Returns at the next change of any pod, or when the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)), self._news:
                await self._news.wait()

    async def _flush(self) -> None:
        """Writes what has changed, until nothing has; one at a time."""
        try:
            while self._dirty:
                rows = [life.row for life in self._dirty.values() if self._is_kept(life)]
                self._dirty.clear()
                try:
                    await self._in_writer(functools.partial(self._save, rows))
                except CubecacheError as error:
                    _LOG.error("the record cannot be written: %s", error)
                await self._tell()
        finally:
            self._flushing = None

    def _is_kept(self, life: PodLife) -> bool:
        return self._lives.get(life.pod.key) is life

    def _save(self, rows: list[PodRow]) -> None:
        for row in rows:
            self._record.save(row)

    async def _flushed(self) -> None:
        if self._flushing is not None:
            await asyncio.wait({self._flushing})

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def with_record(self, work: Callable[[Record], T]) -> T:
        """Runs blocking work on the record, in its thread."""
        return await self._in_writer(functools.partial(work, self._record))

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)


def _claims(pod: Pod) -> set[str]:
    return {volume.claim for volume in pod.volumes if isinstance(volume, BlockVolume)}
