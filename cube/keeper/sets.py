"""Sets: N pods of one template, healed, scaled, and changed pod by pod. The planning is pure."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict

from cube.keeper.status import PodStatus
from cube.pod.model import Pod, PodSet

SET_LABEL: Final = "cubecache/set"
TEMPLATE_LABEL: Final = "cubecache/template"
_SUFFIX_BYTES: Final = 3
_NAME_LIMIT: Final = 50


class SetStatus(BaseModel):
    """What a set has of what it wants."""

    model_config = ConfigDict(extra="forbid")

    key: str
    replicas: int
    current: int  # pods of the newest template
    ready: int
    total: int

    @property
    def settled(self) -> bool:
        """Whether every pod is there, of the newest template, and ready."""
        return self.replicas == self.current == self.ready == self.total


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: pods to start, and keys of pods to delete."""

    start: int = 0
    delete: tuple[str, ...] = ()


def template_mark(wanted: PodSet) -> str:
    """A short digest of the template, so that pods of another one are told."""
    return hashlib.sha256(wanted.template.model_dump_json().encode()).hexdigest()[:12]


def members(wanted: PodSet, pods: Sequence[PodStatus]) -> list[PodStatus]:
    """The set's pods that are not on their way out."""
    prefix = wanted.key + "-"
    return [
        one
        for one in pods
        if one.labels.get(SET_LABEL) == wanted.name
        and one.key.startswith(prefix)
        and not one.terminating
    ]


def next_step(wanted: PodSet, pods: Sequence[PodStatus]) -> Step:
    """The next step towards the wanted set: never more than replicas + max_surge pods at a time,
    and while it changes never fewer than replicas - max_unavailable that are ready.
    """
    mine = members(wanted, pods)
    mark = template_mark(wanted)
    fresh = [one for one in mine if one.labels.get(TEMPLATE_LABEL) == mark]
    over = [one for one in fresh if one.phase in ("Succeeded", "Failed")]
    fresh = [one for one in fresh if one not in over]
    stale = [one for one in mine if one not in fresh and one not in over]
    delete = [one.key for one in over]  # healed: another takes its place
    if len(fresh) > wanted.replicas:
        spare = sorted(fresh, key=lambda one: (one.ready, -one.created))
        delete += [one.key for one in spare[: len(fresh) - wanted.replicas]]
        fresh = [one for one in fresh if one.key not in delete]
    room = wanted.replicas + wanted.max_surge - len(fresh) - len(stale)
    start = max(min(wanted.replicas - len(fresh), room), 0)
    ready = sum(one.ready for one in fresh) + sum(one.ready for one in stale)
    spared = ready - (wanted.replicas - wanted.max_unavailable)
    for one in sorted(stale, key=lambda one: (one.ready, one.created)):
        if not one.ready:
            delete.append(one.key)
        elif spared > 0:
            delete.append(one.key)
            spared -= 1
    return Step(start, tuple(delete))


def new_member(wanted: PodSet) -> Pod:
    """A pod of the set, under a name of its own."""
    name = f"{wanted.name[:_NAME_LIMIT]}-{secrets.token_hex(_SUFFIX_BYTES)}"
    labels = {
        **wanted.template.labels,
        SET_LABEL: wanted.name,
        TEMPLATE_LABEL: template_mark(wanted),
    }
    return wanted.template.model_copy(update={"name": name, "hostname": name, "labels": labels})


def set_status(wanted: PodSet, pods: Sequence[PodStatus]) -> SetStatus:
    """What there is of a set."""
    mine = members(wanted, pods)
    mark = template_mark(wanted)
    current = [one for one in mine if one.labels.get(TEMPLATE_LABEL) == mark]
    return SetStatus(
        key=wanted.key,
        replicas=wanted.replicas,
        current=len(current),
        ready=sum(one.ready for one in current),
        total=len(mine),
    )
