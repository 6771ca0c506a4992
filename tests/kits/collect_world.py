"""A realm with a virtual clock whose every store call is one step, and the rules that hold in it.

The code under test is the real one: this only decides who runs next, when the clock moves, who is
frozen or killed, and looks at every write and delete with the eyes of somebody who sees all.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass, field
from pathlib import Path

from imagecache.blockimage.envelope import unseal
from imagecache.blockimage.generations import State, parse_generations
from imagecache.blockimage.holdings import LeftRecord
from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.locations import LocationTable, split_pack_name
from imagecache.blockimage.records import AliasRecord, LayerRecord, RootRecord
from imagecache.errors import NotFound, Unavailable
from imagecache.store.base import ObjectStat

REALM = "sim"
EPOCH = 1_000_000.0


class Violation(AssertionError):
    """A rule was broken."""


class Killed(BaseException):
    """The process is no more."""


class Pause:
    """Awaited before every step; `until` is the earliest time at which it may go on."""

    def __init__(self, until: float = 0.0) -> None:
        self.until = until

    def __await__(self) -> Generator[Pause, None, None]:
        yield self


@dataclass
class Actor:
    """One process: what it has seen matters to the rules."""

    name: str
    kind: str
    world: World
    dead: bool = False
    seen: dict[int, State] = field(default_factory=dict)  # by its last look at the generations
    found: dict[str, bytes] = field(default_factory=dict)  # roots and layers as last read
    ops_since_look: int = 1 << 30
    ops: int = 0
    at_border: bool = False  # it has just decided or announced something: the worst time to freeze

    async def step(self) -> None:
        if self.dead:
            raise Killed
        await Pause()
        if self.dead:
            raise Killed
        self.at_border = False
        self.ops += 1
        self.ops_since_look += 1

    async def sleep(self, seconds: float) -> None:
        await Pause(self.world.now + seconds)
        if self.dead:
            raise Killed


@dataclass(frozen=True)
class Firm:
    """What somebody was promised: an image, its packs, until when; `None`: until taken back."""

    image: str
    packs: tuple[str, ...]
    until: float | None


class World:
    """The store, the clock, and what is promised to whom."""

    def __init__(self, dice: random.Random, *, atomic: bool = True, faults: float = 0.0) -> None:
        self.dice = dice
        self.now = EPOCH
        self.atomic = atomic
        self.faults = faults
        self.keys = RealmKeys(REALM)
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.states: dict[int, State] = {}
        self.roots: dict[str, RootRecord] = {}  # by key, whatever their generation's state
        self.naming: dict[str, set[str]] = {}  # object key -> keys of roots that need it
        self.layers: dict[str, LayerRecord] = {}
        self.needs: dict[str, tuple[str, ...]] = {}
        self.manifests: dict[str, tuple[str, ...]] = {}  # block image -> index names
        self.promises: dict[str, Firm] = {}
        self.chunks: dict[str, list[bytes]] = {}  # block image -> digests of its chunks
        self.left: dict[int, set[str]] = {}  # by generation: what re-packing left there
        self.deletes = self.expired = self.repacked = 0
        keys = self.keys
        self.borders = (keys.generations, keys.aliases, keys.pins, f"{keys.prefix}leases/")

    def take_over(self, past: World) -> None:
        """Goes on where another world ended, with new processes: its readers are gone."""
        self.now = past.now
        self.objects = dict(past.objects)
        self.states = dict(past.states)
        self.roots, self.layers = dict(past.roots), dict(past.layers)
        self.needs = dict(past.needs)
        self.left = {generation: set(packs) for generation, packs in past.left.items()}
        self.naming = {key: set(roots) for key, roots in past.naming.items()}
        self.promises = {
            who: firm for who, firm in past.promises.items() if not who.startswith("read ")
        }

    # --- the rules

    def state(self, generation: int) -> State:
        return self.states.get(generation, State.DELETED)

    def promise(self, who: str, firm: Firm) -> None:
        self.promises[who] = firm
        self._check_promise(who, firm)

    def take_back(self, who: str) -> None:
        self.promises.pop(who, None)

    def _check_promise(self, who: str, firm: Firm) -> None:
        if firm.until is not None and firm.until < self.now:
            return
        if not any(
            root.image == firm.image and self.state(root.generation).readable
            for root in self.roots.values()
        ):
            raise Violation(f"{who} was promised image {firm.image[7:15]}, and it is gone")
        for pack in firm.packs:
            if self.keys.pack(bytes.fromhex(pack)) not in self.objects:
                raise Violation(f"{who} reads pack {pack}, and it is gone")

    def _check_promises(self) -> None:
        for who, firm in self.promises.items():
            self._check_promise(who, firm)

    def _generation_of(self, key: str) -> tuple[int, str] | None:
        """The generation of a key, and whether it is a pack of it or lies inside."""
        rest = key.removeprefix(self.keys.prefix)
        if rest.startswith("packs/"):
            return int(rest[6:14]), "pack"
        if rest.startswith("g0"):
            return int(rest[1:9]), "inside"
        return None

    def wrote(self, actor: Actor, key: str, body: bytes) -> None:
        rest = key.removeprefix(self.keys.prefix)
        if rest.startswith("generations/"):
            self._moved(actor)
            return
        if rest.startswith("aliases/"):
            firm = self.promises.get(key)
            if firm is not None and firm.image != AliasRecord.decode(body).image:
                self.take_back(key)
        place = self._generation_of(key)
        if place is None:
            return
        generation, _ = place
        if actor.seen.get(generation) is not State.ACTIVE:
            raise Violation(f"rule 1: {actor.name} writes {rest}, and saw it not active")
        if "/left/" in key:
            self.left.setdefault(generation, set()).update(LeftRecord.decode(body).packs)
        if actor.kind == "repacker" and ("/roots/" in key or "/layers/" in key):
            self._left_behind(key, body, generation, actor.found.get(key))
        if "/roots/" in key:
            if actor.kind in ("builder", "repacker") and actor.ops_since_look > 1:
                raise Violation(f"rule 1: {actor.name} commits {rest} without a look before")
            self._rooted(key, RootRecord.decode(body))
        elif "/layers/" in key:
            self.layers[key] = LayerRecord.decode(body)

    def _left_behind(self, key: str, body: bytes, generation: int, found: bytes | None) -> None:
        """What a re-packer takes out of the record it found stays named in the generation."""
        record: type[RootRecord | LayerRecord] = RootRecord if "/roots/" in key else LayerRecord
        if found is None:
            raise Violation(f"rule 4: {key} is re-packed unread")
        gone = set(record.decode(found).packs) - set(record.decode(body).packs)
        # A pack of this very generation cannot be deleted while the generation is readable.
        gone = {pack for pack in gone if split_pack_name(bytes.fromhex(pack))[0] < generation}
        if self.state(generation).readable and gone - self.left.get(generation, set()):
            raise Violation(f"rule 4: {key} names packs no more that readers may have found in it")

    def _rooted(self, key: str, root: RootRecord) -> None:
        inside = self.keys.within(root.generation)
        needs = [self.keys.pack(bytes.fromhex(pack)) for pack in root.packs]
        needs += [f"{inside}manifests/{root.block_image}", f"{inside}locations/{root.locations}"]
        needs += [self.keys.blob(blob, root.generation) for blob in (root.image, root.config)]
        needs += [f"{inside}indexes/{name}" for name in self.manifests[root.block_image]]
        self.roots[key] = root
        for need in self.needs.get(key, ()):
            self.naming[need].discard(key)  # a re-packed image needs its old packs no more
        self.needs[key] = tuple(needs)
        for need in needs:
            self.naming.setdefault(need, set()).add(key)
        if self.state(root.generation).readable:
            for need in needs:
                if need not in self.objects:
                    raise Violation(f"readable root {key} lacks {need}")
            self._located(key, root)

    def _located(self, key: str, root: RootRecord) -> None:
        """Every chunk is where the root's table says, and the root names the table's packs."""
        sealed, _ = self.objects[f"{self.keys.within(root.generation)}locations/{root.locations}"]
        table = LocationTable.decode(unseal(sealed, bytes.fromhex(root.locations)))
        if {pack.hex() for pack in table.packs} != set(root.packs):
            raise Violation(f"root {key} names other packs than its table")
        for n, digest in enumerate(self.chunks[root.block_image]):
            pack, _ = self.objects[self.keys.pack(table.locate(n).pack)]
            if digest.hex().encode() not in pack:
                raise Violation(f"chunk {digest.hex()[:8]} of {key} is not where its table says")

    def _moved(self, actor: Actor) -> None:
        found = parse_generations(
            self.keys.generations,
            [(k, t) for k, (_, t) in self.objects.items() if k.startswith(self.keys.generations)],
        )
        states = {known.number: known.state for known in found}
        for number, state in self.states.items():
            if states.get(number, State.DELETED) < state:
                raise Violation(f"rule 3: generation {number} went back from {state.word}")
        gone = {n for n, state in states.items() if state is State.DELETED} - {
            n for n, state in self.states.items() if state is State.DELETED
        }
        for number in gone:
            inside, packs = self.keys.within(number), self.keys.packs(number)
            closed = self.objects[self.keys.generation(number, State.EXPIRED)][1]
            # What a frozen process wrote after that is no fault of this rule.
            left = [
                key
                for key, (_, written) in self.objects.items()
                if key.startswith((inside, packs)) and written <= closed
            ]
            if left:
                raise Violation(f"rule 5: generation {number} is deleted, and holds {left[0]}")
        self.expired += sum(
            state is State.EXPIRED and self.states.get(n) is not State.EXPIRED
            for n, state in states.items()
        )
        self.states = states
        self._check_promises()

    def read(self, actor: Actor, key: str) -> None:
        place = self._generation_of(key)
        if place is None or place[1] == "pack":
            return
        if not actor.seen.get(place[0], State.DELETED).readable:
            raise Violation(f"rule 2: {actor.name} reads {key} of a generation it saw closed")

    def deleting(self, actor: Actor, key: str) -> None:
        place = self._generation_of(key)
        if place is None or key not in self.objects:
            return
        generation, sort = place
        if self.state(generation).readable:
            raise Violation(f"rule 4: {actor.name} deletes {key} of a readable generation")
        for root in self.naming.get(key, ()):
            if root in self.objects and self.state(self.roots[root].generation).readable:
                raise Violation(f"rule 4: {actor.name} deletes {key}, which {root} needs")
        if sort == "pack":
            for where, layer in self.layers.items():
                named = any(self.keys.pack(bytes.fromhex(p)) == key for p in layer.packs)
                alive = where in self.objects and self.state(self._generation_of(where)[0]).readable
                if named and alive:
                    raise Violation(f"rule 4: {actor.name} deletes {key}, which {where} needs")
        self.deletes += 1

    def deleted(self, key: str) -> None:
        if "/aliases/" in key or "/pins/" in key:
            self.take_back(key)
        self.roots.pop(key, None)
        self.layers.pop(key, None)
        for need in self.needs.pop(key, ()):
            self.naming.get(need, set()).discard(key)
        if "/packs/" in key:
            self._check_promises()

    def is_pack_there(self, pack: str) -> bool:
        return self.keys.pack(bytes.fromhex(pack)) in self.objects

    def check_all(self) -> None:
        """Every readable root has all that it needs."""
        for key, root in self.roots.items():
            if self.state(root.generation).readable:
                for need in self.needs[key]:
                    if need not in self.objects:
                        raise Violation(f"readable root {key} lacks {need}")
        self._check_promises()


class StepStore:
    """The world's store as one actor has it."""

    def __init__(self, world: World, actor: Actor) -> None:
        self.world = world
        self.actor = actor

    def _maybe_fail(self) -> None:
        if self.world.faults and self.world.dice.random() < self.world.faults:
            raise Unavailable("a scripted fault")

    async def get(self, key: str, *, limit: int) -> bytes:
        await self.actor.step()
        self._maybe_fail()
        self.world.read(self.actor, key)
        try:
            body = self.world.objects[key][0]
        except KeyError:
            raise NotFound(key) from None
        if "/roots/" in key or "/layers/" in key:
            self.actor.found[key] = body
        return body

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        assert isinstance(body, bytes)
        border = key.startswith(self.world.borders)
        self.actor.at_border = self.actor.at_border or border or "/roots/" in key
        await self.actor.step()
        self._maybe_fail()
        if only_if_absent:
            if key in self.world.objects:
                return False
            if not self.world.atomic:
                self.actor.at_border = True
                await self.actor.step()
                self.actor.ops_since_look -= 1
        self.world.objects[key] = (bytes(body), self.world.now)
        self.actor.at_border = border
        self.world.wrote(self.actor, key, body)
        self._maybe_fail()
        if only_if_absent and not self.world.atomic:
            await self.actor.step()
            return key in self.world.objects and self.world.objects[key][0] == body
        return True

    async def stat(self, key: str) -> ObjectStat:
        await self.actor.step()
        self._maybe_fail()
        try:
            body, modified = self.world.objects[key]
        except KeyError:
            raise NotFound(key) from None
        return ObjectStat(key, len(body), modified)

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Pages in key order; what is written behind the cursor is not seen."""
        cursor = ""
        looks = prefix == self.world.keys.generations
        found: list[tuple[str, float]] = []
        while True:
            await self.actor.step()
            self._maybe_fail()
            objects = self.world.objects
            page = sorted(key for key in objects if key > cursor and key.startswith(prefix))
            size = self.world.dice.choice((3, 20, 1000)) if not looks else 1000
            # As they are now: who takes its time over a page may meet what is gone by then.
            stats = [ObjectStat(key, len(objects[key][0]), objects[key][1]) for key in page[:size]]
            for stat in stats:
                found.append((stat.key, stat.modified))
                yield stat
            if len(page) <= size:
                break
            cursor = page[size - 1]
        if looks:
            self.actor.seen = {g.number: g.state for g in parse_generations(prefix, found)}
            self.actor.ops_since_look = 0
            self.actor.at_border = True

    async def delete(self, key: str) -> None:
        await self.actor.step()
        self._maybe_fail()
        self.world.deleting(self.actor, key)
        if self.world.objects.pop(key, None) is not None:
            self.world.deleted(key)
        self._maybe_fail()

    async def claims_are_atomic(self) -> bool:
        return self.world.atomic

    async def close(self) -> None:
        pass


def pack_generation(pack: str) -> int:
    return split_pack_name(bytes.fromhex(pack))[0]
