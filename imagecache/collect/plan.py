"""What a collection does next, from a snapshot: pure, and each guard a function of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imagecache.blockimage.generations import Generation, State
from imagecache.collect.snapshot import HeldPin, Lease, Roots, Snapshot, Tombstones
from imagecache.errors import Denied

TOMBSTONES_PER_RECORD = 20_000
LAPSED_SECONDS = 7 * 86_400
"""How long leases and pins lie about after they have run out."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds by the store's clock; `share` of the stored bytes may go without being asked for."""

    min_age: float = 86_400.0
    grace: float = 86_400.0
    share: float = 0.2


@dataclass(frozen=True, slots=True)
class Doomed:
    """One object to delete, and why."""

    key: str
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one collection deletes and buries; computed before any of it is done."""

    doomed: tuple[Doomed, ...]
    tombstones: tuple[str, ...]  # packs that nothing names now, in hex
    newest: int
    finished: tuple[int, ...]  # generations of which nothing is left
    spent: tuple[str, ...]  # keys of records that have done their work

    @property
    def doomed_bytes(self) -> int:
        """Stored bytes that go."""
        return sum(doomed.size for doomed in self.doomed)


def plan_sweep(snapshot: Snapshot, policy: Policy) -> Sweep:
    """What may be deleted now, and which packs are buried for a later collection."""
    states = {known.number: known for known in snapshot.generations}
    marked = snapshot.marked()
    doomed: list[Doomed] = []
    for number, stats in sorted(snapshot.inside.items()):
        known = states.get(number)
        if known is not None and is_swept(known, snapshot.now, policy):
            why = f"generation {number} {known.state.word}"
            doomed += [Doomed(stat.key, stat.size, why) for stat in stats]
    buried = {name for stones in snapshot.tombstones for name in stones.record.packs}
    ripe_stones = [x for x in snapshot.tombstones if is_ripe(x, snapshot, policy)]
    ripe = {name for stones in ripe_stones for name in stones.record.packs}
    tombstones: list[str] = []
    left: set[int] = set()
    spent = [stones.key for stones in ripe_stones]
    for name, stat in sorted(snapshot.packs.items()):
        number = pack_generation(name)
        known = states.get(number)
        if known is None or not is_unreadable(known) or is_marked(name, marked):
            left.add(number)
        elif name in ripe:
            doomed.append(Doomed(stat.key, stat.size, "pack that no image names"))
            if name in snapshot.quarantined:
                spent.append(snapshot.quarantined[name])
        else:
            left.add(number)
            if name not in buried:
                tombstones.append(name)
    finished = [
        known.number
        for known in snapshot.generations
        if known.state is State.EXPIRED and is_empty(known.number, snapshot)
    ]
    spent += lapsed(snapshot)
    return Sweep(tuple(doomed), tuple(tombstones), snapshot.newest, tuple(finished), tuple(spent))


def pack_generation(name: str) -> int:
    """The generation in a pack's name, in hex."""
    return int.from_bytes(bytes.fromhex(name[:8]), "little")


def is_unreadable(generation: Generation) -> bool:
    """Whether nothing reads under a generation any more (invariant 2)."""
    return generation.state >= State.EXPIRED


def is_marked(name: str, marked: frozenset[str]) -> bool:
    """Whether a readable generation, or a reader in force, names a pack (invariant 4)."""
    return name in marked


def is_swept(generation: Generation, now: float, policy: Policy) -> bool:
    """Whether what lies in a generation may go: expired for the grace, or garbage of a deleted."""
    if generation.state is State.DELETED:
        return True
    since = generation.since(State.EXPIRED)
    return is_unreadable(generation) and since is not None and now - since >= policy.grace


def is_ripe(stones: Tombstones, snapshot: Snapshot, policy: Policy) -> bool:
    """Whether the packs of a batch may go, where they are still unmarked.

    A grace has passed, and every generation that was there when they were buried has expired: what
    a frozen builder, collector or repair may still write lands in one of those.
    """
    if snapshot.now - stones.modified < policy.grace:
        return False
    return all(
        is_unreadable(known)
        for known in snapshot.generations
        if known.number <= stones.record.newest
    )


def is_empty(number: int, snapshot: Snapshot) -> bool:
    """Whether nothing of a generation is left, packs included (invariant 5)."""
    if snapshot.inside.get(number):
        return False
    return not any(pack_generation(name) == number for name in snapshot.packs)


def lapsed(snapshot: Snapshot) -> list[str]:
    """Keys of leases and pins that ran out long ago."""
    holders = snapshot.holders
    all_held: tuple[Lease | HeldPin, ...] = (
        *holders.builders,
        *holders.readers,
        *holders.pins,
    )
    return [
        held.key
        for held in all_held
        if snapshot.now - held.modified > held.record.ttl_seconds + LAPSED_SECONDS
    ]


def require_moderate(sweep: Sweep, snapshot: Snapshot, policy: Policy) -> None:
    """Denied where a sweep would delete more than the policy's share of the stored bytes (K8)."""
    total = snapshot.stored_bytes
    if sweep.doomed_bytes > policy.share * total:
        raise Denied(
            f"this would delete {sweep.doomed_bytes} of {total} stored bytes in "
            f"{len(sweep.doomed)} objects",
            remedy="look at --dry-run; then say --yes-delete-many",
        )


def has_garbage(snapshot: Snapshot) -> bool:
    """Whether a newer generation would leave anything behind."""
    live, named = snapshot.holders.live(snapshot.now), snapshot.named()
    dead = any(
        root.image not in live
        for mentions in snapshot.mentions.values()
        for root in mentions.roots.values()
    )
    return dead or any(name not in named for name in snapshot.packs)


def due_to_open(snapshot: Snapshot, policy: Policy) -> int | None:
    """The number of the generation to open, where the newest is old enough and garbage is about."""
    active = [known for known in snapshot.generations if known.state is State.ACTIVE]
    if active:
        since = active[-1].since(State.ACTIVE)
        young = since is None or snapshot.now - since < policy.min_age
        if young or not has_garbage(snapshot):
            return None
    elif not snapshot.generations:
        return None
    return snapshot.newest + 1


def due_to_retire(
    generations: Iterable[Generation], builders: Iterable[Lease], now: float
) -> list[int]:
    """Active generations that are not the newest and that nobody builds into (invariant 1)."""
    active = [known.number for known in generations if known.state is State.ACTIVE]
    built = {lease.record.generation for lease in builders if lease.holds(now)}
    return [number for number in active[:-1] if number not in built]


def target_of(generations: Iterable[Generation]) -> int | None:
    """The generation that live images are copied into: the newest active one."""
    active = [known.number for known in generations if known.state is State.ACTIVE]
    return max(active, default=None)


@dataclass(frozen=True, slots=True)
class Copying:
    """One image to copy: its root's name and where it is."""

    name: str
    image: str
    source: int
    target: int


def due_to_copy(
    generations: Iterable[Generation],
    target: int,
    roots: Mapping[int, Roots],
    live: frozenset[str],
) -> list[Copying]:
    """Live images of retired generations that the target lacks; from the newest that has them."""
    found: dict[str, Copying] = {}
    for known in generations:
        if known.number < target and known.state in (State.RETIRED, State.CLOSING):
            for name, root in roots[known.number].items():
                if root.image in live and name not in roots[target]:
                    found[name] = Copying(name, root.image, known.number, target)
    return list(found.values())


def due_to_close(
    generations: Iterable[Generation], target: int, now: float, policy: Policy
) -> list[int]:
    """Generations that were retired a grace ago, so that readers have had time to move on."""
    found = []
    for known in generations:
        since = known.since(State.RETIRED)
        retired = known.number < target and known.state is State.RETIRED
        if retired and since is not None and now - since >= policy.grace:
            found.append(known.number)
    return found


def due_to_expire(
    before: Iterable[Generation], after: Iterable[Generation], target: int
) -> list[int]:
    """Generations that were closing before a look that found nothing to copy.

    None where the target closed meanwhile: what was seen there may have been passed over.
    """
    open_target = any(known.number == target and known.state < State.CLOSING for known in after)
    if not open_target:
        return []
    return [
        known.number for known in before if known.number < target and known.state is State.CLOSING
    ]
