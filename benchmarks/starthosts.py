"""The servers of one link, the hosts before them, and what their store knows of starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrooted import mount_and_run
from shaped import Link
from startloads import Load
from testbed.machine import ROOT
from testbed.processes import Process, Stage
from testbed.servers import ObjectStore, Proxy, Registry, store_environment

from imagecache.composition import alias_name, opened_catalog
from imagecache.oci.reference import parse_reference
from imagecache.profile.profile import Profile
from imagecache.profile.starts import Starts
from imagecache.settings import Settings, load_settings
from preload.client import connect

COMMAND = str(ROOT / ".venv/bin/cubecache")


@dataclass
class Bench:
    """The servers of one link, and where states of hosts lie."""

    stage: Stage
    link: Link
    objects: ObjectStore
    objects_proxy: Proxy
    registry: Registry
    registry_proxy: Proxy
    vm: bool
    folders: int = 0

    def settings(self, name: str, *, shaped: bool) -> Settings:
        """A host of its own; `shaped` reaches the store through the shaper."""
        url = self.objects.url(self.objects_proxy.endpoint if shaped else None)
        return load_settings(os.environ, state_dir=self.stage.folder / name, store=url)

    def fresh_folder(self) -> Path:
        """A path that nothing was mounted below before."""
        self.folders += 1
        return self.stage.folder / f"run-{self.folders}"

    def forget_host(self, name: str) -> None:
        """Removes a host's state."""
        shutil.rmtree(self.stage.folder / name, ignore_errors=True)


@contextlib.contextmanager
def daemon(bench: Bench, settings: Settings) -> Iterator[Process]:
    """A daemon on a host, ready when this enters."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    process = bench.stage.start([*command, "serve"], os.environ | store_environment())
    process.wait_until(lambda: b"ready:" in process.log.read_bytes())
    try:
        yield process
    finally:
        process.stop()


def cubecache(settings: Settings, *arguments: str) -> None:
    """A command that must succeed."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    subprocess.run(
        [*command, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | store_environment(),
    )


class Records:
    """The start records of a store, set aside and put back, to choose what is known."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, dict[str, bytes]] = {"unlearned": {}}

    async def keep(self, name: str) -> None:
        """Remembers what is known now under a name, and forgets it in the store."""
        async with opened_catalog(self._settings) as (opened, catalog):
            keys = [x.key async for x in opened.store.list(catalog.keys.prefix)]
            keys = [key for key in keys if "/starts/" in key]
            self._kept[name] = {key: await opened.store.get(key, limit=1 << 20) for key in keys}
            for key in keys:
                await opened.store.delete(key)

    async def use(self, name: str) -> None:
        """Lets the store know that, and nothing else."""
        await self.keep("")
        async with opened_catalog(self._settings) as (opened, _):
            for key, record in self._kept[name].items():
                await opened.store.put(key, record)


async def know_nothing(settings: Settings, reference: str) -> None:
    """Stores an empty profile, so that nothing is predicted in its place."""
    async with opened_catalog(settings) as (_, catalog):
        name = alias_name(parse_reference(reference))
        image = await catalog.resolve_name(name)
        async for root in catalog.roots():
            if root.image == image:
                empty = Profile(image, bytes.fromhex(root.block_image), 0, (), ())
                await Starts(catalog).save(name.repository, empty, None, root.generation)


async def learn(bench: Bench, load: Load, settings: Settings, reference: str) -> None:
    """One recorded start, unshaped."""
    with daemon(bench, settings):
        async with connect(settings, start=False) as client:
            handle = await client.export(reference, record=True)
            # The mount's own export would not be recorded: this one's socket is mounted by hand.
            await asyncio.to_thread(mount_and_run, bench.fresh_folder(), load, handle.uri)
            await client.stop_recording(handle.name)


async def filled(settings: Settings, reference: str) -> None:
    """Returns when the host has all of the image, so that a warm start has the link to itself."""
    async with connect(settings, start=False) as client:
        handle = await client.export(reference)
        fields = handle.fields
        while fields["fill"]["state"] in ("idle", "running", "waiting"):
            await asyncio.sleep(0.1)
            (fields,) = [x for x in await client.exports() if x["name"] == handle.name]
        await client.unexport(handle.name, force=True)


def read_set(settings: Settings, reference: str) -> int:
    """Bytes that the recorded start read: of files, and of the metadata region."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    said = subprocess.run(
        [*command, "profile", "show", reference, "--json"],
        check=True,
        capture_output=True,
        env=os.environ | store_environment(),
    ).stdout
    known: dict[str, Any] = json.loads(said)
    return int(known["bytes"]) + sum(int(part["length"]) for part in known["metadata"])
