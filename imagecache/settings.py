"""Configuration: one TOML file, the environment over it, flags over both. Parsed once, strictly.

Only the composition roots (the CLI and the daemon) call `load_settings`; everything else is given
the values it needs.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagecache.blockimage.keys import RealmKeys
from imagecache.errors import Denied, UsageError

_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|TiB|)")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
MAX_CONFIG = 1 << 20
FILLS = ("whole", "hot", "none")
INTEGRITIES = ("admission", "every-read")


@dataclass(frozen=True, slots=True)
class CacheSection:
    """[cache]: the host's arena. Sizes in bytes, times in seconds."""

    budget_bytes: int = 20 << 30
    integrity: str = "admission"
    fill: str | None = None  # None: whole where the image fits the budget, else hot
    fill_bytes_per_second: int = 0  # 0: no limit
    stall_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class StoreSection:
    """[store]: how the bucket is reached."""

    tier_url: str | None = None


@dataclass(frozen=True, slots=True)
class RegistrySection:
    """[registry]: how registries are reached."""

    docker_config: str | None = None
    plain_http: tuple[str, ...] = ()
    insecure_tls: tuple[str, ...] = ()
    ca_file: str | None = None
    allowed_private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildSection:
    """[build]: bounds of a conversion."""

    level: int = 3
    deadline_seconds: float = 3600.0
    worker_memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class NbdSection:
    """[nbd]: where exports are served besides the unix socket."""

    tcp: str | None = None  # HOST:PORT


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that is configured."""

    state_dir: Path
    store_url: str
    realm: str = "default"
    config_file: Path | None = None
    cache: CacheSection = field(default_factory=CacheSection)
    store: StoreSection = field(default_factory=StoreSection)
    registry: RegistrySection = field(default_factory=RegistrySection)
    build: BuildSection = field(default_factory=BuildSection)
    nbd: NbdSection = field(default_factory=NbdSection)

    @property
    def control_socket(self) -> Path:
        """Where the daemon of this state directory answers."""
        return self.state_dir / "control.sock"

    @property
    def nbd_socket(self) -> Path:
        """Where the daemon of this state directory serves all exports."""
        return self.state_dir / "nbd.sock"


def load_settings(
    environment: Mapping[str, str],
    *,
    config: Path | None = None,
    state_dir: Path | None = None,
    store: str | None = None,
    realm: str | None = None,
) -> Settings:
    """Settings from the file, then the environment, then the arguments; the last one wins.

    Raises UsageError for an unknown key, a wrong type or an unusable value, and Denied for a file
    that others may write (J10).
    """
    path = config or _path(environment.get("CUBECACHE_CONFIG"))
    document = _read(path) if path else {}
    sections = {
        "cache": _section(CacheSection, document, "cache"),
        "store": StoreSection(),
        "registry": _section(RegistrySection, document, "registry"),
        "build": _section(BuildSection, document, "build"),
        "nbd": _section(NbdSection, document, "nbd"),
    }
    top_store = document.pop("store", None)
    if isinstance(top_store, dict):
        url_in_file = top_store.pop("url", None)
        sections["store"] = _section(StoreSection, {"store": top_store}, "store")
    else:
        url_in_file = top_store
    directory = state_dir or _path(environment.get("CUBECACHE_STATE_DIR"))
    directory = directory or _path(_text(document.pop("state_dir", None), "state_dir"))
    directory = (directory or default_state_dir(environment)).expanduser().absolute()
    chosen_realm = realm or environment.get("CUBECACHE_REALM")
    chosen_realm = chosen_realm or _text(document.pop("realm", None), "realm") or "default"
    RealmKeys(chosen_realm)
    url = store or environment.get("CUBECACHE_STORE") or _text(url_in_file, "store")
    for leftover in document:
        if leftover not in ("state_dir", "realm"):
            raise UsageError(f"configuration key {leftover!r} is unknown", remedy=f"edit {path}")
    settings = Settings(
        state_dir=directory,
        store_url=url or (directory / "store").as_uri(),
        realm=chosen_realm,
        config_file=path,
        **sections,
    )
    _check(settings)
    return settings


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """Root's /var/lib/cubecache, else the user's XDG state directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/cubecache")
    base = environment.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "cubecache"


def parse_size(value: object, name: str) -> int:
    """Bytes from an integer or a text like "20GiB"; raises UsageError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UsageError(f"{name} = {value!r} is not a size", remedy='write bytes or "20GiB"')
    return int(match[1]) * _UNITS[match[2]]


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _read(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_CONFIG:
            raise UsageError(f"configuration {path} is not a regular file of at most 1 MiB")
        if status.st_mode & stat.S_IWOTH:
            raise Denied(f"configuration {path} may be written by anybody", remedy="chmod o-w it")
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"configuration {path} does not exist") from error
    except OSError as error:
        raise Denied(f"configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration {path} is not TOML: {error}") from error


def _section(kind: Any, document: dict[str, Any], name: str) -> Any:
    raw = document.pop(name, {})
    if not isinstance(raw, dict):
        raise UsageError(f"configuration [{name}] is not a table")
    values = {}
    for key, value in raw.items():
        annotation = kind.__annotations__.get(key)
        if annotation is None:
            raise UsageError(f"configuration key {name}.{key} is unknown")
        values[key] = _typed(f"{name}.{key}", value, annotation)
    return kind(**values)


def _typed(name: str, value: Any, annotation: str) -> Any:
    if annotation == "int":
        return parse_size(value, name)
    if annotation == "float":
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        raise UsageError(f"{name} = {value!r} is not a positive number")
    if annotation.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{name} = {value!r} is not a list of texts")
    return _text(value, name)


def _text(value: object, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"{name} = {value!r} is not a text")


def _check(settings: Settings) -> None:
    if settings.cache.fill not in (None, *FILLS):
        raise UsageError(f"cache.fill = {settings.cache.fill!r}", remedy="whole, hot or none")
    if settings.cache.integrity not in INTEGRITIES:
        raise UsageError(
            f"cache.integrity = {settings.cache.integrity!r}", remedy="admission or every-read"
        )
    if not 1 <= settings.build.level <= 19:
        raise UsageError(f"build.level = {settings.build.level}", remedy="1 to 19")
    if settings.nbd.tcp is not None and not re.fullmatch(r".+:\d{1,5}", settings.nbd.tcp):
        raise UsageError(f"nbd.tcp = {settings.nbd.tcp!r}", remedy="write HOST:PORT")
    # A unix socket's path has 108 bytes (sun_path), the terminator included.
    if len(os.fsencode(settings.control_socket)) > 107:
        raise UsageError(
            f"state directory {settings.state_dir} is too long for a unix socket below it",
            remedy="use a path of at most 94 bytes",
        )
