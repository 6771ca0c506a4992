"""The composition root shared by the daemon and the commands: settings in, wired parts out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.seals import Seals
from imagecache.build.pipeline import Builder, BuildSettings
from imagecache.build.progress import BuildResult, Report
from imagecache.build.spool import Spool, builder_lock
from imagecache.build.spooled import SpoolServing
from imagecache.catalog import AliasName, Catalog
from imagecache.errors import Denied
from imagecache.facechoice import FaceChoice
from imagecache.oci.credentials import docker_config_path
from imagecache.oci.platform import host_platform, parse_platform
from imagecache.oci.reference import Reference, RegistryReference, parse_reference
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.source import open_source
from imagecache.oci.throttle import Throttle
from imagecache.realmsecrets import load_secrets
from imagecache.settings import Settings
from imagecache.store.open import OpenedStore, open_store
from imagecache.store.sealed import SealedStore
from imagecache.store.settings import StoreSettings


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """Which image, for which platform, in which face (a `FaceChoice`'s text).

    Chunks of the images `related` need not be stored again. That changes no digest, so requests
    that differ in it alone are equal.
    """

    reference: str
    platform: str | None = None
    face: str = "erofs"
    related: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def parse(
        cls, text: str, platform: str | None, face: str, related: Sequence[str] = ()
    ) -> ImageRequest:
        """Checks the texts and makes paths absolute, so that another process can be handed it."""
        if platform is not None:
            parse_platform(platform)
        choice = FaceChoice.parse(face)
        base = Path.cwd()
        others = tuple(parse_reference(other, base=base).canonical for other in related)
        return cls(parse_reference(text, base=base).canonical, platform, str(choice), others)


def alias_name(reference: Reference) -> AliasName:
    """A reference split into repository and tag (`@digest` where only a digest is given)."""
    text = reference.canonical
    if isinstance(reference, RegistryReference):
        tag = f"@{reference.digest}" if reference.digest else str(reference.tag)
        return AliasName(f"{reference.host}/{reference.repository}", tag, text)
    scheme = text.partition(":")[0]
    return AliasName(f"{scheme}:{reference.path}", reference.tag or "", text)


async def open_realm(settings: Settings, *, ask_anew: bool = False) -> OpenedStore:
    """The configured store, sealed where secrets are configured; the caller closes it.

    What this host found out about the store in the last day is taken for true unless `ask_anew`.

    HTTP proxies are those of the environment (http_proxy, https_proxy, no_proxy).
    """
    source = settings.encryption.secrets
    secrets = None
    if source is not None:
        secrets = await asyncio.to_thread(load_secrets, source, os.environ)
    opened = open_store(
        settings.store_url,
        StoreSettings(
            tier_url=settings.store.tier_url,
            ca_file=Path(settings.store.ca_file) if settings.store.ca_file else None,
            proxies=store_proxies(settings.store_url),
            remember_in=None if ask_anew else settings.state_dir / "stores",
        ),
    )
    if secrets is None:
        return opened
    seals = Seals(secrets)
    sealed = SealedStore(opened.store, RealmKeys(settings.realm), seals)
    return replace(opened, store=sealed, seals=seals)


def store_proxies(store_url: str) -> dict[str, str]:
    """The proxies of the environment by scheme, but for an endpoint that no_proxy names."""
    endpoint = dict(parse_qsl(urlsplit(store_url).query)).get("endpoint", "")
    host = urlsplit(endpoint).netloc
    if host and proxy_bypass(host):
        return {}
    return {scheme: url for scheme, url in getproxies().items() if scheme in ("http", "https")}


@asynccontextmanager
async def opened_catalog(
    settings: Settings, *, ask_anew: bool = False
) -> AsyncIterator[tuple[OpenedStore, Catalog]]:
    """The configured store and the catalog of the configured realm; `ask_anew` as `open_realm`."""
    opened = await open_realm(settings, ask_anew=ask_anew)
    try:
        yield opened, Catalog(opened.store, settings.realm, opened.seals)
    finally:
        await opened.close()


def registry_settings(settings: Settings, throttle: Throttle | None = None) -> RegistrySettings:
    """How registries are reached; `throttle` bounds what is downloaded."""
    section = settings.registry
    return RegistrySettings(
        docker_config=(
            Path(section.docker_config) if section.docker_config else docker_config_path(os.environ)
        ),
        plain_http_hosts=frozenset(section.plain_http),
        insecure_tls_hosts=frozenset(section.insecure_tls),
        ca_file=Path(section.ca_file) if section.ca_file else None,
        allowed_private=frozenset(section.allowed_private),
        throttle=throttle,
    )


def prepare_state_dir(settings: Settings) -> None:
    """Makes the state directory, private to its owner; raises Denied. Blocking."""
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(settings.state_dir, os.W_OK | os.X_OK)
    except OSError as error:
        raise Denied(
            f"state directory {settings.state_dir} cannot be made: {error.strerror}",
            remedy="set --state-dir or CUBECACHE_STATE_DIR",
        ) from error
    if not usable:
        raise Denied(
            f"state directory {settings.state_dir} is not writable",
            remedy="run as its owner, or set --state-dir",
        )


async def build_image(
    settings: Settings,
    catalog: Catalog,
    request: ImageRequest,
    report: Report,
    *,
    alias: AliasName | None = None,
    distrusted: frozenset[str] | None = None,
    serving: SpoolServing | None = None,
    throttle: Throttle | None = None,
    slot: int = 0,
) -> BuildResult:
    """Builds one image under a slot's builder lock; Busy where another build runs in that slot.

    `alias` is the name it gets, if not the request's; `distrusted` and `serving` are as of
    `Builder.build`.
    """
    reference = parse_reference(request.reference)
    choice = FaceChoice.parse(request.face)
    platform = parse_platform(request.platform) if request.platform else host_platform()
    await asyncio.to_thread(prepare_state_dir, settings)
    suffix = f"-{slot}" if slot else ""
    builder = Builder(
        catalog,
        Spool(settings.state_dir / f"spool{suffix}"),
        BuildSettings(
            limits=settings.limits,
            level=settings.build.level,
            threads=settings.build.threads,
            deadline_seconds=settings.build.deadline_seconds,
            worker_memory_bytes=settings.build.worker_memory_bytes,
        ),
    )
    source = open_source(reference, registry_settings(settings, throttle))
    related = dict.fromkeys((*request.related, *settings.build.related))
    try:
        with builder_lock(settings.state_dir / f"builder{suffix}.lock"):
            return await builder.build(
                source,
                platform,
                face=choice.face,
                options=choice.options,
                alias=alias or alias_name(reference),
                report=report,
                distrusted=distrusted,
                references=tuple(alias_name(parse_reference(name)) for name in related),
                serving=serving,
            )
    finally:
        await source.close()
