"""Sets: the planner against a simulated host, and one set in real machines (soak)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from kits.pods import PodHost, make_image, until

from cube.keeper.sets import (
    SET_LABEL,
    TEMPLATE_LABEL,
    new_member,
    next_step,
    set_status,
)
from cube.keeper.status import PodStatus, first_status
from cube.pod.model import Container, Pod, PodSet


def set_of(replicas: int, image: str, *, surge: int = 1, missing: int = 0) -> PodSet:
    template = Pod(name="s", containers=(Container(name="a", image=image),))
    return PodSet(
        name="s",
        replicas=replicas,
        template=template,
        max_surge=surge,
        max_unavailable=missing,
    )


class World:
    """Pods that get ready, or fail, when chance says so."""

    def __init__(self, seed: int) -> None:
        self.pods: list[PodStatus] = []
        self._chance = random.Random(seed)
        self._clock = 0.0

    def take(self, wanted: PodSet) -> None:
        step = next_step(wanted, self.pods)
        self.pods = [one for one in self.pods if one.key not in step.delete]
        for _ in range(step.start):
            self._clock += 1
            pod = new_member(wanted)
            self.pods.append(first_status(pod, pod.name, self._clock))

    def go_on(self, *, trouble: float) -> None:
        for one in self.pods:
            (container,) = one.containers
            if self._chance.random() < trouble:
                container.state, container.ready, container.code = "terminated", False, 1
            elif container.state == "waiting" and self._chance.random() < 0.5:
                container.state, container.ready = "running", True
            one.settle()

    def ready(self) -> int:
        return sum(one.ready for one in self.pods)


@pytest.mark.quick
@pytest.mark.parametrize(("surge", "missing"), [(1, 0), (0, 1), (2, 2), (3, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_a_rolling_update_keeps_its_bounds(seed, surge, missing):
    world = World(seed)
    old, new = (set_of(4, image, surge=surge, missing=missing) for image in ("old", "new"))
    for _ in range(30):
        world.take(old)
        world.go_on(trouble=0)
    assert set_status(old, world.pods).settled
    for _ in range(80):
        world.take(new)
        assert len(world.pods) <= 4 + surge
        assert world.ready() >= 4 - missing
        world.go_on(trouble=0)
    assert set_status(new, world.pods).settled


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(5))
def test_what_fails_is_replaced_and_scaling_follows(seed):
    world = World(seed)
    for replicas in (3, 5, 1, 0, 2):
        for round_ in range(60):
            world.take(set_of(replicas, "i"))
            world.go_on(trouble=0.2 if round_ < 20 else 0)
        assert set_status(set_of(replicas, "i"), world.pods).settled


@pytest.mark.quick
def test_members_have_names_and_labels_of_their_own():
    wanted = set_of(2, "i")
    one, two = new_member(wanted), new_member(wanted)
    assert one.name != two.name and one.name.startswith("s-") and one.hostname == one.name
    assert one.labels[SET_LABEL] == "s"
    assert one.labels[TEMPLATE_LABEL] == two.labels[TEMPLATE_LABEL]


SET = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: front}
spec:
  replicas: 2
  template:
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: IMAGE
        command: [sh, -c, "echo VERSION; trap 'exit 0' TERM; while true; do sleep 1; done"]
        resources: {limits: {memory: 32Mi}}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodHost]:
    directory = tmp_path_factory.mktemp("sets")
    host = PodHost(directory / "s", make_image(directory / "image"))
    yield host
    host.close()


@pytest.mark.soak
def test_a_set_is_made_healed_changed_and_deleted(host: PodHost):
    host.call("run", host.manifest("one", SET.replace("VERSION", "one")), "--timeout", "300")
    names = [one["key"] for one in host.json("list")["pods"]]
    assert len(names) == 2
    host.call("delete", names[0])
    until("another to take its place", lambda: host.json("list", "--sets")["sets"][0]["ready"] == 2)
    host.call("run", host.manifest("two", SET.replace("VERSION", "two")), "--timeout", "300")
    pods = host.json("list")["pods"]
    assert len(pods) == 2 and not {one["key"] for one in pods} & set(names)
    assert [host.call("logs", one["key"]) for one in pods] == ["two\n"] * 2
    host.call("delete", "front")
    assert host.json("list")["pods"] == [] and host.processes("cubecache-vm") == []
