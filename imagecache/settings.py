"""Configuration: one TOML file, the environment over it, flags over both. Parsed once, strictly.

Only the composition roots (the CLI and the daemon) call `load_settings`; everything else is given
the values it needs. `SETTINGS` is the one list of what can be set; `Settings.origins` says where
each value came from.
"""

from __future__ import annotations

import dataclasses
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
from imagecache.flatten.limits import Limits
from imagecache.sections import (
    ApiSection,
    BuildSection,
    CacheSection,
    EncryptionSection,
    LogSection,
    NbdSection,
    PreloadSection,
    PricesSection,
    RegistrySection,
    StoreSection,
)

__all__ = [
    "FILLS",
    "SETTINGS",
    "ApiSection",
    "BuildSection",
    "CacheSection",
    "EncryptionSection",
    "LogSection",
    "NbdSection",
    "PreloadSection",
    "PricesSection",
    "RegistrySection",
    "Setting",
    "Settings",
    "StoreSection",
    "load_settings",
    "parse_duration",
    "parse_size",
    "reloaded",
]

_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|TiB|)")
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION = re.compile(r"(\d{1,9})\s*([smhdw]?)", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
MAX_CONFIG = 1 << 20
FILLS = ("whole", "hot", "none")
INTEGRITIES = ("admission", "every-read")
ROLES = ("read", "preload", "admin")
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that is configured."""

    state_dir: Path
    store_url: str
    realm: str = "default"
    config_file: Path | None = None
    cache: CacheSection = field(default_factory=CacheSection)
    store: StoreSection = field(default_factory=StoreSection)
    encryption: EncryptionSection = field(default_factory=EncryptionSection)
    registry: RegistrySection = field(default_factory=RegistrySection)
    build: BuildSection = field(default_factory=BuildSection)
    limits: Limits = field(default_factory=Limits)
    preload: PreloadSection = field(default_factory=PreloadSection)
    prices: PricesSection = field(default_factory=PricesSection)
    nbd: NbdSection = field(default_factory=NbdSection)
    api: ApiSection = field(default_factory=ApiSection)
    log: LogSection = field(default_factory=LogSection)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def control_socket(self) -> Path:
        """Where the daemon of this state directory answers."""
        return self.state_dir / "control.sock"

    @property
    def nbd_socket(self) -> Path:
        """Where the daemon of this state directory serves all exports."""
        return self.state_dir / "nbd.sock"

    def value(self, name: str) -> Any:
        """A setting's value by its name in `SETTINGS`."""
        section, _, key = name.rpartition(".")
        if name == "store.url":
            return self.store_url
        return getattr(getattr(self, section) if section else self, key)

    def origin(self, name: str) -> str:
        """`default`, `file PATH`, `environment NAME` or `flag NAME`."""
        return self.origins.get(name, DEFAULT)

    def with_flag(self, name: str, value: str, flag: str) -> Settings:
        """These settings with one `section.key` as a command's flag gave it; UsageError."""
        section, _, key = name.partition(".")
        row = next(row for row in SETTINGS if row.name == name)
        part = dataclasses.replace(
            getattr(self, section), **{key: _typed(flag, value, row.kind, is_text=True)}
        )
        changed: Any = {section: part}
        settings = dataclasses.replace(
            self, **changed, origins={**self.origins, name: f"flag {flag}"}
        )
        _check(settings)
        return settings


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table of settings; `kind` is the annotation's text."""

    name: str
    kind: str
    default: Any
    text: str
    reload: bool

    @property
    def environment(self) -> str:
        """The variable that sets it."""
        short = "store" if self.name == "store.url" else self.name
        return "CUBECACHE_" + short.replace(".", "_").upper()


_SECTIONS: dict[str, Any] = {
    "cache": CacheSection,
    "store": StoreSection,
    "encryption": EncryptionSection,
    "registry": RegistrySection,
    "build": BuildSection,
    "limits": Limits,
    "preload": PreloadSection,
    "prices": PricesSection,
    "nbd": NbdSection,
    "api": ApiSection,
    "log": LogSection,
}
_STATE_DIR = Setting("state_dir", "str", None, "Where everything of this host is kept.", False)
_STORE_URL = Setting("store.url", "str", None, "The store; unset: STATE_DIR/store.", False)
_REALM = Setting("realm", "str", "default", "The name-space inside which content is shared.", False)
SETTINGS: tuple[Setting, ...] = (
    _STATE_DIR,
    _STORE_URL,
    _REALM,
    *(
        Setting(
            f"{name}.{item.name}",
            str(item.type),
            item.default,
            item.metadata["text"],
            item.metadata["reload"],
        )
        for name, kind in _SECTIONS.items()
        for item in dataclasses.fields(kind)
        if item.metadata
    ),
)


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
    named = environment.get("CUBECACHE_CONFIG")
    path = config or (Path(named) if named else None)
    given = _flatten(_read(path), path) if path else {}
    flags = {"state_dir": state_dir, "store.url": store, "realm": realm}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for row in SETTINGS:
        value, origins[row.name] = row.default, DEFAULT
        if row.name in given:
            value = _typed(row.name, given[row.name], row.kind)
            origins[row.name] = f"file {path}"
        if environment.get(row.environment):
            text = environment[row.environment]
            value = _typed(row.environment, text, row.kind, is_text=True)
            origins[row.name] = f"environment {row.environment}"
        flag = flags.get(row.name)
        if flag:
            value = str(flag)
            origins[row.name] = "flag --" + row.name.removesuffix(".url").replace("_", "-")
        values[row.name] = value
    directory = Path(values["state_dir"] or default_state_dir(environment)).expanduser().absolute()
    RealmKeys(values["realm"])
    settings = Settings(
        state_dir=directory,
        store_url=values["store.url"] or (directory / "store").as_uri(),
        realm=values["realm"],
        config_file=path,
        origins=origins,
        **{
            name: kind(
                **{
                    item.name: values[f"{name}.{item.name}"]
                    for item in dataclasses.fields(kind)
                    if item.metadata
                }
            )
            for name, kind in _SECTIONS.items()
        },
    )
    _check(settings)
    return settings


def reloaded(current: Settings, fresh: Settings) -> tuple[Settings, list[str], list[str]]:
    """What a running daemon goes on with, the names it takes, and those that need a restart."""
    changed = [row for row in SETTINGS if current.value(row.name) != fresh.value(row.name)]
    taken = [row.name for row in changed if row.reload]
    merged: Any = {}
    origins = dict(current.origins)
    for name in taken:
        section, _, key = name.partition(".")
        part = merged.get(section, getattr(current, section))
        merged[section] = dataclasses.replace(part, **{key: fresh.value(name)})
        origins[name] = fresh.origin(name)
    left = [row.name for row in changed if not row.reload]
    return dataclasses.replace(current, **merged, origins=origins), taken, left


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


def parse_duration(text: str, name: str, *, least: int = 1) -> int:
    """Seconds from "90", "15m", "12h", "7d" or "2w", at least `least`; raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) * _SECONDS[match[2]] < least:
        raise UsageError(f"{name} = {text!r} is not a duration", remedy="write 90s, 15m, 12h or 7d")
    return int(match[1]) * _SECONDS[match[2]]


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"configuration {path} is not TOML: {error}") from error


def _flatten(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """`section.key` -> value; every key is one of `SETTINGS`."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif name == "store":
            flat["store.url"] = value
        elif name in _SECTIONS:
            raise UsageError(f"configuration [{name}] is not a table")
        else:
            flat[name] = value
    known = {row.name for row in SETTINGS}
    for name in flat:
        if name not in known:
            raise UsageError(f"configuration key {name!r} is unknown", remedy=f"edit {path}")
    return flat


def _typed(name: str, value: Any, kind: str, *, is_text: bool = False) -> Any:
    """A value of the kind; `is_text` where it is from the environment or a flag."""
    if kind == "int":
        return parse_size(value, name)
    if kind == "float":
        return _number(name, value, is_text=is_text)
    if kind == "bool":
        value = _BOOLEANS.get(value.lower()) if is_text else value
        if isinstance(value, bool):
            return value
        raise UsageError(f"{name} is neither true nor false")
    if kind.startswith("tuple"):
        value = [part for part in value.split(",") if part] if is_text else value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{name} = {value!r} is not a list of texts")
    if isinstance(value, str):
        return value
    raise UsageError(f"{name} = {value!r} is not a text")


def _number(name: str, value: Any, *, is_text: bool) -> float:
    try:
        number = float(value) if is_text or type(value) in (int, float) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if 0 < number < 1e12:
        return number
    raise UsageError(f"{name} = {value!r} is not a positive number")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "cache.fill": (None, *FILLS),
    "cache.integrity": INTEGRITIES,
    "api.group_role": ROLES,
    "log.format": ("text", "json"),
    "log.level": ("debug", "info", "warning", "error"),
}


def _check(settings: Settings) -> None:
    for name, choices in _CHOICES.items():
        if settings.value(name) not in choices:
            raise UsageError(
                f"{name} = {settings.value(name)!r}",
                remedy="one of " + ", ".join(filter(None, choices)),
            )
    if not 1 <= settings.build.level <= 19:
        raise UsageError(f"build.level = {settings.build.level}", remedy="1 to 19")
    if not 1 <= settings.preload.concurrency <= 8:
        raise UsageError(f"preload.concurrency = {settings.preload.concurrency}", remedy="1 to 8")
    for name in ("nbd.tcp", "api.tcp"):
        address = settings.value(name)
        if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
            raise UsageError(f"{name} = {address!r}", remedy="write HOST:PORT")
    api = settings.api
    if api.tcp and not api.tokens:
        raise UsageError("api.tcp is set without api.tokens", remedy="cubecache token --help")
    if (api.tls_certificate is None) != (api.tls_key is None):
        raise UsageError("api.tls_certificate and api.tls_key go together")
    # A unix socket's path has 108 bytes (sun_path), the terminator included.
    if len(os.fsencode(settings.control_socket)) > 107:
        raise UsageError(
            f"state directory {settings.state_dir} is too long for a unix socket below it",
            remedy="use a path of at most 94 bytes",
        )
