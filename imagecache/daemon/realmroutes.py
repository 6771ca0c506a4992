"""The control API's handlers of the realm: images, profiles, pins, leases, store."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from imagecache.accounting import Accountant
from imagecache.blockimage.holdings import LeaseRecord
from imagecache.blockimage.records import MAX_RECORD, RootRecord
from imagecache.chunks import BLOCK
from imagecache.daemon.access import Role, hidden
from imagecache.daemon.bodies import Field
from imagecache.daemon.operations import Call, operation
from imagecache.daemon.ownership import owned_images
from imagecache.daemon.service import Service
from imagecache.errors import Busy, Corrupt, Denied, NotFound, Unavailable
from imagecache.imagelist import drop_names, listed_images
from imagecache.leases.clock import StoreClock
from imagecache.leases.pins import Pin, pin, pins, unpin
from imagecache.profile.starts import KnownStart

LOOKS = 4
LOOK_SECONDS = 60.0
MAX_PIN_SECONDS = 366 * 86400
_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{8,64}")
_PIN = (
    Field("image", "text", "A manifest digest, or 8 and more digits of one.", required=True),
    Field("seconds", "number", "For so long.", required=True, least=1, most=MAX_PIN_SECONDS),
)
_ASKED = (501, 502, 503)  # a record of a newer version, a damaged one, no answer
_STORE = (404, *_ASKED)


class RealmRoutes:
    """One method per operation. What it looks up in the store is bounded in number and time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._looks = asyncio.Semaphore(LOOKS)
        self._adding_up = asyncio.Lock()
        self._preparing = asyncio.Lock()

    @asynccontextmanager
    async def _look(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(LOOK_SECONDS), self._looks:
                yield
        except TimeoutError:
            raise Unavailable(f"the store did not answer in {LOOK_SECONDS:.0f} seconds") from None

    async def _now(self) -> float:
        """The store's time; the host's where the store may not be written."""
        try:
            return await StoreClock(self._service.catalog).now()
        except Denied:
            return time.time()

    async def _image(self, call: Call, text: str) -> list[RootRecord]:
        """The roots of one image, if the caller may know of it."""
        found: dict[str, list[RootRecord]] = {}
        owned = owned_images(self._service, call.caller)
        if _DIGEST.fullmatch(text):
            wanted = text.removeprefix("sha256:")
            async for root in self._service.catalog.roots():
                if root.image.partition(":")[2].startswith(wanted) and (
                    owned is None or root.image in owned
                ):
                    found.setdefault(root.image, []).append(root)
        if len(found) != 1:  # none, or too few digits: neither is one image
            raise hidden("image", text)
        return next(iter(found.values()))

    # --- images

    @operation("GET", "/v1/images", role=Role.READ, answers={200: "Images"}, problems=_ASKED)
    async def images(self, call: Call) -> web.Response:
        """Every image that the caller may know of: of an owner, what it preloaded or exports."""
        async with self._look():
            found = await listed_images(self._service.catalog)
        owned = owned_images(self._service, call.caller)
        if owned is not None:
            found = [image for image in found if image["image"] in owned]
        return web.json_response({"images": found})

    @operation(
        "GET", "/v1/images/{image}", role=Role.READ, answers={200: "Images"}, problems=_STORE
    )
    async def one_image(self, call: Call) -> web.Response:
        """One image by its manifest digest, or 8 and more digits of it; one entry per face."""
        async with self._look():
            digest = (await self._image(call, call.name))[0].image
            found = await listed_images(self._service.catalog)
        return web.json_response({"images": [x for x in found if x["image"] == digest]})

    @operation(
        "DELETE", "/v1/images/{image}", role=Role.ADMIN, answers={200: "Dropped"}, problems=_STORE
    )
    async def drop_image(self, call: Call) -> web.Response:
        """Drop an image's names; what nothing else relies on goes with a later collection."""
        async with self._look():
            digest = (await self._image(call, call.name))[0].image
            dropped = await drop_names(self._service.catalog, digest)
        return web.json_response({"image": digest, "dropped": dropped})

    @operation(
        "GET",
        "/v1/images/{image}/profile",
        role=Role.READ,
        answers={200: "Profile"},
        problems=_STORE,
    )
    async def profile(self, call: Call) -> web.Response:
        """What is known of an image's start: its own profile, or its repository's last one."""
        async with self._look():
            digest = (await self._image(call, call.name))[0].image
            known: KnownStart | None = None
            for alias in await self._service.catalog.aliases():
                if alias.image == digest and (known is None or not known.own):
                    known = await self._service.starts.starts.find(alias.repository, digest)
        if known is None:
            raise NotFound(
                f"nothing is known of the start of {digest}", remedy="cubecache profile build IMAGE"
            )
        return web.json_response(_profile_json(known))

    @operation(
        "POST",
        "/v1/images/{image}/profile",
        role=Role.PRELOAD,
        answers={200: "Profile"},
        problems=(409, 422, 507, *_STORE),
    )
    async def prepare(self, call: Call) -> web.Response:
        """Give an image that has no profile one: its repository's last, carried, or predicted."""
        if self._preparing.locked():
            raise Busy("a start is being prepared for somebody else", remedy="ask again")
        async with self._preparing, self._look():
            root = (await self._image(call, call.name))[0]
            named = [x for x in await self._service.catalog.aliases() if x.image == root.image]
            if not named:
                raise NotFound(f"image {root.image} has no name", remedy="preload it by a name")
            repository = named[0].repository
            await self._service.starts.builder.prepare(repository, root)
            known = await self._service.starts.starts.own(repository, root.image)
        return web.json_response(_profile_json(known))

    # --- pins and leases

    @operation("GET", "/v1/pins", role=Role.READ, answers={200: "Pins"}, problems=_ASKED)
    async def pins(self, call: Call) -> web.Response:
        """Every pin of an image that the caller may know of, run out or not."""
        async with self._look():
            found = await pins(self._service.catalog)
            now = await self._now() if found else 0.0
        owned = owned_images(self._service, call.caller)
        shown = [_pin_json(x, now) for x in found if owned is None or x.record.image in owned]
        return web.json_response({"pins": shown})

    @operation(
        "POST",
        "/v1/pins",
        role=Role.PRELOAD,
        body=_PIN,
        answers={200: "Pin"},
        problems=(409, 507, *_STORE),
    )
    async def pin(self, call: Call) -> web.Response:
        """Keep an image from collection for a time; only an admin can shorten a pin."""
        catalog, seconds = self._service.catalog, int(call.body["seconds"])
        async with self._look():
            root = (await self._image(call, call.body["image"]))[0]
            now = await self._now()
            there = [x for x in await pins(catalog) if x.record.image == root.image]
            longer = there and there[0].modified + there[0].record.ttl_seconds >= now + seconds
            if not longer or call.caller.role is Role.ADMIN:
                await pin(catalog, root, root.image, seconds)
                there = [x for x in await pins(catalog) if x.record.image == root.image]
        if not there:
            raise Busy(f"the pin of {root.image} was removed meanwhile", remedy="pin it again")
        return web.json_response(_pin_json(there[0], now))

    @operation("DELETE", "/v1/pins/{image}", role=Role.ADMIN, answers={204: None}, problems=_STORE)
    async def unpin(self, call: Call) -> web.Response:
        """Remove a pin, whoever made it."""
        async with self._look():
            digest = (await self._image(call, call.name))[0].image
            await unpin(self._service.catalog, digest)
        return web.Response(status=204)

    @operation("GET", "/v1/leases", role=Role.READ, answers={200: "Leases"}, problems=_ASKED)
    async def leases(self, call: Call) -> web.Response:
        """Who builds, reads or collects in this realm now; an owner sees who holds its images."""
        catalog = self._service.catalog
        owned = owned_images(self._service, call.caller)
        shown = []
        async with self._look():
            now = await self._now()
            for prefix in (
                catalog.keys.build_leases,
                catalog.keys.reader_leases,
                catalog.keys.collector_lease,
            ):
                async for stat in catalog.store.list(prefix):
                    try:
                        raw = await catalog.store.get(stat.key, limit=MAX_RECORD)
                        lease = LeaseRecord.decode(raw)
                    except (NotFound, Corrupt):
                        continue  # given back meanwhile, or of no use to its holder either
                    images = [x for x in lease.images if owned is None or x in owned]
                    if owned is None or images:
                        shown.append(_lease_json(lease, images, stat.modified, now))
        return web.json_response({"leases": shown})

    # --- the store

    @operation("GET", "/v1/store", role=Role.READ, answers={200: "Store"}, problems=_ASKED)
    async def store(self, call: Call) -> web.Response:
        """The realm's generations, and what was read from which source since the daemon began."""
        call.caller.require_whole("the store's counters")
        async with self._look():
            generations = await self._service.catalog.generations()
        return web.json_response(
            {
                "url": self._service.opened.url,
                "realm": self._service.settings.realm,
                "generations": [
                    {"number": each.number, "state": each.state.word} for each in generations
                ],
                "reads": self._service.opened.counters.snapshot(),
            }
        )

    @operation(
        "GET",
        "/v1/store/account",
        role=Role.ADMIN,
        answers={200: "Account"},
        problems=(409, *_STORE),
    )
    async def account(self, call: Call) -> web.Response:
        """What the realm holds and how much of it is shared; reads every manifest: slow."""
        call.caller.require_whole("the realm's account")
        if self._adding_up.locked():
            raise Busy("the realm is being added up for somebody else", remedy="ask again")
        async with self._adding_up, self._look():
            answer = await Accountant(self._service.catalog).account()
        return web.json_response(answer.as_json())


def _profile_json(known: KnownStart) -> dict[str, Any]:
    boot = known.boot
    return {
        "image": known.record.image,
        "repository": known.record.repository,
        "own": known.own,
        "recordings": known.profile.sources,
        "files": known.profile.paths,
        "bytes": known.profile.blocks * BLOCK,
        "boot_pack": None
        if boot is None
        else {"chunks": len(boot.entries), "stored_bytes": boot.stored_bytes},
    }


def _pin_json(found: Pin, now: float) -> dict[str, Any]:
    record = found.record
    return {
        "image": record.image,
        "name": record.name,
        "ttl_seconds": record.ttl_seconds,
        "seconds_left": max(0, round(found.modified + record.ttl_seconds - now)),
    }


def _lease_json(
    lease: LeaseRecord, images: list[str], modified: float, now: float
) -> dict[str, Any]:
    return {
        "purpose": lease.purpose,
        "holder": lease.holder,
        "images": images,
        "ttl_seconds": lease.ttl_seconds,
        "seconds_left": max(0, round(modified + lease.ttl_seconds - now)),
    }
