"""Runs a simulated realm by a seed: picks who goes next, moves the clock, freezes and kills."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from inspect import CORO_CLOSED, CORO_CREATED, getcoroutinestate
from typing import Any

from kits.collect_actors import CHUNKS, INDEX_NAMES, Life
from kits.collect_world import Actor, Killed, Pause, World

ROLES = (
    *("builder", "builder", "builder", "collector", "collector"),
    *("reader", "reader", "owner", "repacker", "repacker"),
)
FREEZES = (300.0, 1500.0, 4000.0, 9000.0, 20_000.0)


@dataclass
class Process:
    """One running actor; `wakes` is when it may take its next step."""

    role: str
    actor: Actor
    life: Coroutine[Any, Any, None]
    wakes: float = 0.0


@dataclass
class Tally:
    """What happened in a run, so that a test can tell that it was not idle."""

    steps: int = 0
    kills: int = 0
    freezes: int = 0
    deletes: int = 0
    expired: int = 0
    roots: int = 0
    repacked: int = 0


@dataclass
class Simulator:
    """One seed's run. `calm` leaves freezes, kills and faults out."""

    seed: int
    calm: bool = False
    past: World | None = None  # a world that has lived already
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        atomic = self.dice.random() < 0.6
        faults = 0.0 if self.calm else self.dice.choice((0.0, 0.002))
        self.world = World(self.dice, atomic=atomic, faults=faults)
        self.world.manifests, self.world.chunks = INDEX_NAMES, CHUNKS
        if self.past is not None:
            self.world.take_over(self.past)
        self.freezing = 0.0 if self.calm else self.dice.choice((0.0005, 0.003, 0.01))
        # At borders the rare meetings happen that luck alone would need millions of steps for.
        self.hunting = 0.0 if self.calm else self.dice.choice((0.0, 0.03, 0.1))
        self.killing = 0.0 if self.calm else self.dice.choice((0.0, 0.0005, 0.003))
        paces = (0.5, 3.0, 10.0) if self.past is None else (3.0, 10.0, 40.0)
        self.pace = self.dice.choice(paces)
        self.born = 0
        self.processes = [self._start(role) for role in ROLES]

    def _start(self, role: str) -> Process:
        self.born += 1
        actor = Actor(f"{role}{self.born}", role, self.world)
        life = Life(self.world, actor, self.dice)
        forever: Callable[[], Coroutine[Any, Any, None]] = getattr(life, role)
        wakes = self.world.now + self.dice.uniform(0, 2000 if self.past is None else 50)
        return Process(role, actor, forever(), wakes)

    def run(self, steps: int) -> Tally:
        try:
            for _ in range(steps):
                self._step()
            self.world.check_all()
        finally:
            self.close()
        self.tally.deletes = self.world.deletes
        self.tally.expired = self.world.expired
        self.tally.repacked = self.world.repacked
        self.tally.roots = len(self.world.roots)
        return self.tally

    def close(self) -> None:
        for process in self.processes:
            self._kill(process)

    def _kill(self, process: Process) -> None:
        process.actor.dead = True
        if getcoroutinestate(process.life) == CORO_CLOSED:
            return
        if getcoroutinestate(process.life) == CORO_CREATED:
            process.life.close()
            return
        try:
            process.life.throw(Killed())
        except (Killed, StopIteration):
            pass

    def _step(self) -> None:
        world, dice = self.world, self.dice
        ready = [p for p in self.processes if p.wakes <= world.now]
        if not ready:
            world.now = min(p.wakes for p in self.processes)
            ready = [p for p in self.processes if p.wakes <= world.now]
        process = dice.choice(ready)
        world.now += dice.expovariate(1 / self.pace)
        luck = dice.random()
        if process.actor.at_border and dice.random() < self.hunting:
            luck = self.killing
        if luck < self.killing:
            self.tally.kills += 1
            self._kill(process)
            world.take_back(f"read {process.actor.name}")
            self.processes[self.processes.index(process)] = self._start(process.role)
            return
        if luck < self.killing + self.freezing:
            self.tally.freezes += 1
            process.wakes = world.now + dice.choice(FREEZES) * dice.uniform(0.5, 1.5)
            return
        pause: Pause = process.life.send(None)
        process.wakes = pause.until
        self.tally.steps += 1
