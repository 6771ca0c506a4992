"""`cubecache watch`: new versions of repositories are preloaded when they appear.

What a watch wants is a rule, not a list of events: the newest tags that match are to be here. So
it keeps no state: a tag whose digest the realm has under that name is left alone, whatever happened
between two looks, and a tag that moved is preloaded again. Each version starts with the profile of
the one before it, as any preload of the same repository does.
"""

from __future__ import annotations

import asyncio
import fnmatch
import random
import re
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import click

from imagecache.blockimage.keys import ImageKey
from imagecache.catalog import Catalog
from imagecache.composition import ImageRequest, alias_name, opened_catalog, registry_settings
from imagecache.errors import CubecacheError, NotFound, UsageError
from imagecache.facechoice import FaceChoice
from imagecache.oci.platform import host_platform, parse_platform
from imagecache.oci.reference import RegistryReference, parse_reference
from imagecache.oci.registry import RegistrySource
from imagecache.oci.source import open_source
from imagecache.session import Session, face_option, json_option, platform_option
from imagecache.settings import Settings, parse_duration
from preload.fanout import Order

LEAST_SECONDS = 10
MOST_SECONDS = 6 * 3600.0
_PARTS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which tags of a repository are to be preloaded: patterns, and how many of the newest."""

    repository: RegistryReference
    patterns: tuple[str, ...]
    newest: int

    def chosen(self, tags: Sequence[str]) -> list[str]:
        """The tags that match, newest version first, at most `newest`."""
        matching = {
            tag for tag in tags for pattern in self.patterns if fnmatch.fnmatchcase(tag, pattern)
        }
        return sorted(matching, key=version_key, reverse=True)[: self.newest]


def version_key(tag: str) -> tuple[tuple[int, int, str], ...]:
    """Orders tags as people number versions: v1.9 before v1.10, v2.0-rc1 before v2.0."""
    parts = [
        (2, int(part), "") if part.isdigit() else (0 if part.startswith("-") else 1, 0, part)
        for part in _PARTS.split(tag)
        if part
    ]
    # An end is above `-rc`, and below `.1`.
    return (*parts, (1, 0, ""))


def pause_seconds(interval: float, failures: int, chance: float) -> float:
    """Until the next look: a fifth more or less, twice as long after each failure in a row."""
    longest = max(interval, MOST_SECONDS)
    backed_off = min(interval * 2.0 ** min(failures, 30), longest)
    return backed_off * (0.8 + 0.4 * chance)


async def missing(
    settings: Settings, catalog: Catalog, rule: Rule, platform: str | None, face: str
) -> list[ImageRequest]:
    """What the rule wants and the realm has not, newest first; asks the registry and the store."""
    source = open_source(rule.repository, registry_settings(settings))
    assert isinstance(source, RegistrySource)
    try:
        tags = rule.chosen(await source.tags())
    finally:
        await source.close()
    name = f"{rule.repository.host}/{rule.repository.repository}"
    requests = [ImageRequest.parse(f"{name}:{tag}", platform, face) for tag in tags]
    return [request for request in requests if not await _is_here(settings, catalog, request)]


async def _is_here(settings: Settings, catalog: Catalog, request: ImageRequest) -> bool:
    reference = parse_reference(request.reference)
    platform = parse_platform(request.platform) if request.platform else host_platform()
    source = open_source(reference, registry_settings(settings))
    try:
        image = await source.resolve(platform)
    finally:
        await source.close()
    choice = FaceChoice.parse(request.face)
    try:
        if await catalog.resolve_name(alias_name(reference)) != str(image.digest):
            return False
        await catalog.find_root(ImageKey(str(image.digest), choice.face, choice.options))
    except NotFound:
        return False
    return True


@click.command(
    epilog="\b\nExamples:\n  cubecache watch registry.example/team/app --tags 'v*'\n"
    "  cubecache watch registry.example/team/app --tags 'v*' --tags latest --every 15m\n"
    "  cubecache watch registry.example/team/app --once   # from a timer or a CronJob"
)
@click.argument("repositories", metavar="REPO...", nargs=-1, required=True)
@click.option(
    "--tags",
    "patterns",
    multiple=True,
    default=("*",),
    show_default=True,
    metavar="PATTERN",
    help="Which tags, as in 'v1.*'; repeatable.",
)
@click.option(
    "--newest",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="So many versions of each repository are kept preloaded.",
)
@click.option("--every", default="5m", show_default=True, metavar="TIME", help="About so often.")
@click.option("--once", is_flag=True, help="Look once, and end when that is preloaded.")
@click.option("--pin", metavar="TIME", help="Keep the images for so long, as in 12h or 7d.")
@platform_option
@face_option
@json_option
@click.pass_obj
def watch(
    session: Session,
    *,
    repositories: tuple[str, ...],
    patterns: tuple[str, ...],
    newest: int,
    every: str,
    once: bool,
    pin: str | None,
    platform: str | None,
    face: str,
) -> None:
    """Preload new versions of repositories when they appear.

    The newest tags that match are preloaded, by the daemon where one runs, and so is a tag that
    has moved. A new version starts with what the one before it is known to read. A registry that
    does not answer is asked again, less and less often.
    """
    rules = [_rule(text, patterns, newest) for text in repositories]
    interval = parse_duration(every, "--every", least=LEAST_SECONDS)
    pin_seconds = parse_duration(pin, "--pin") if pin else 0
    run = _Watch(session, rules, platform, face, pin_seconds)
    asyncio.run(run.once() if once else run.forever(interval))


def _rule(text: str, patterns: tuple[str, ...], newest: int) -> Rule:
    repository = parse_reference(text)
    if not isinstance(repository, RegistryReference):
        raise UsageError(f"{text!r} is no repository of a registry")
    if repository.digest is not None or (repository.tag != "latest" or text.endswith(":latest")):
        raise UsageError(f"{text!r} names one image", remedy="give its tag by --tags")
    return Rule(repository, patterns, newest)


@dataclass(frozen=True, slots=True)
class _Watch:
    session: Session
    rules: list[Rule]
    platform: str | None
    face: str
    pin_seconds: int

    async def once(self) -> None:
        """Every rule once; raises the first failure, after all were tried."""
        failures = await self._look()
        if failures:
            raise failures[0]

    async def forever(self, interval: float) -> None:
        """Looks until it is interrupted."""
        failures = 0
        while True:
            failed = await self._look()
            failures = failures + 1 if failed else 0
            await asyncio.sleep(pause_seconds(interval, failures, random.random()))

    async def _look(self) -> list[CubecacheError]:
        failures: list[CubecacheError] = []
        settings = self.session.settings
        for rule in self.rules:
            try:
                async with opened_catalog(settings) as (_, catalog):
                    wanted = await missing(settings, catalog, rule, self.platform, self.face)
                # The oldest first: its profile is there for the next.
                for request in reversed(wanted):
                    failures += await self._preload(request)
            except CubecacheError as error:
                failures.append(error)
                self.session.terminal.note(f"cubecache: {rule.repository.repository}: {error}")
        return failures

    async def _preload(self, request: ImageRequest) -> list[CubecacheError]:
        # The commands import this module's command: not at the top.
        from preload.cli import preloads  # noqa: PLC0415

        order = Order([request], pin_seconds=self.pin_seconds)
        answer: dict[str, Any]
        try:
            async with AsyncExitStack() as stack:
                (result,) = await preloads(self.session, order, stack)
                answer = await result()
        except CubecacheError as error:
            self.session.terminal.note(f"cubecache: {request.reference}: {error}")
            return [error]
        self.session.terminal.answer(answer, f"{request.reference}: {answer['image']}")
        return []
