"""YAML to plain values, each with its line, under caps. Pure.

Only what Kubernetes manifests need: mappings with text keys, sequences and plain scalars of YAML
1.1 (so `on` is a boolean, and the model then refuses it where text is wanted). Aliases are counted
where they are expanded; tags, merge keys and duplicate keys are refused with their line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from imagecache.errors import LimitExceeded, Rejected

BYTE_LIMIT: Final = 4 * 1024 * 1024  # of one file
NODE_LIMIT: Final = 50_000  # values of one file, after aliases were expanded
DEPTH_LIMIT: Final = 64
DOCUMENT_LIMIT: Final = 500

Path = tuple[str | int, ...]

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"))
_FALSE = frozenset(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"))
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_OCTAL = re.compile(r"[-+]?0[0-7]{1,20}")
_HEXADECIMAL = re.compile(r"[-+]?0x[0-9a-fA-F]{1,20}")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TIMESTAMP = re.compile(
    r"\d{4}-\d\d?-\d\d?([Tt ]+\d\d?:\d\d:\d\d(\.\d*)?[ \t]*(Z|[-+]\d\d?(:?\d\d)?)?)?"
)


@dataclass(frozen=True, slots=True)
class Timestamp:
    """A plain scalar that YAML takes for a date; no manifest field wants one."""

    text: str


@dataclass(slots=True)
class Document:
    """One document: its value, and the line (from 1) of every value by its path."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int:
        """The line of a value, or of the nearest thing around it that is there."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(raw: bytes) -> list[Document]:
    """The file's documents but the empty ones; raises Rejected or LimitExceeded with the line."""
    if len(raw) > BYTE_LIMIT:
        raise LimitExceeded(f"the manifest has {len(raw)} bytes, over the limit of {BYTE_LIMIT}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise Rejected(f"line {line}: the manifest is not UTF-8") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return list(_documents(yaml.parse(text, Loader=loader)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "broken"
        raise Rejected(f"{where}this is not YAML: {problem}") from error


def _documents(events: Iterator[Any]) -> Iterator[Document]:
    nodes = 0
    for count, event in enumerate(
        event for event in events if isinstance(event, yaml.DocumentStartEvent)
    ):
        if count >= DOCUMENT_LIMIT:
            raise LimitExceeded(
                f"line {_line(event)}: more than {DOCUMENT_LIMIT} documents in one manifest"
            )
        composer = _Composer(events, nodes)
        document = composer.compose()
        nodes = composer.nodes
        if document.value is not None:
            yield document


class _Composer:
    """Builds one document's values from its events."""

    def __init__(self, events: Iterator[Any], nodes: int) -> None:
        self._events = events
        self._anchors: dict[str, list[Any]] = {}  # the events of anchored nodes
        self._recording: list[list[Any]] = []
        self.nodes = nodes
        self._document = Document(None)

    def compose(self) -> Document:
        self._document.value = self._node(next(self._events), (), self._events)
        return self._document

    def _node(self, event: Any, path: Path, events: Iterator[Any]) -> Any:
        self.nodes += 1
        if self.nodes > NODE_LIMIT:
            raise LimitExceeded(
                f"line {_line(event)}: more than {NODE_LIMIT} values once aliases are expanded"
            )
        if len(path) > DEPTH_LIMIT:
            raise LimitExceeded(f"line {_line(event)}: nested deeper than {DEPTH_LIMIT}")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, path)
        self._document.lines.setdefault(path, _line(event))
        if event.anchor is None:
            return self._content(event, path, events)
        # Kept as events, so that an alias is counted value by value where it is used.
        kept = [event]
        value = self._content(event, path, _kept(events, kept))
        self._anchors[event.anchor] = kept
        return value

    def _alias(self, event: Any, path: Path) -> Any:
        found = self._anchors.get(event.anchor)
        if found is None:
            raise Rejected(f"line {_line(event)}: alias *{event.anchor} has no anchor before it")
        replay = iter(found)
        first = next(replay)
        self._document.lines.setdefault(path, _line(event))
        return self._content(first, path, replay)

    def _content(self, event: Any, path: Path, events: Iterator[Any]) -> Any:
        if event.tag is not None and not (event.tag == "!" or _is_core(event.tag)):
            raise Rejected(f"line {_line(event)}: tag {event.tag[:60]} is not allowed")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            values: list[Any] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                values.append(self._node(item, (*path, len(values)), events))
            return values
        mapping: dict[str, Any] = {}
        while not isinstance(item := next(events), yaml.MappingEndEvent):
            key = self._key(item)
            if key in mapping:
                raise Rejected(f"line {_line(item)}: {key!r} stands twice in one mapping")
            self._document.lines.setdefault((*path, key), _line(item))
            mapping[key] = self._node(next(events), (*path, key), events)
        return mapping

    def _key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise Rejected(f"line {_line(event)}: a mapping's key is not text")
        if event.value == "<<" and event.implicit[0]:
            raise Rejected(f"line {_line(event)}: merge keys (<<) are not supported")
        key = _scalar(event)
        if not isinstance(key, str):
            raise Rejected(f"line {_line(event)}: the key {event.value!r} is not text; quote it")
        return key


def _kept(events: Iterator[Any], kept: list[Any]) -> Iterator[Any]:
    for event in events:
        kept.append(event)
        yield event


def _is_core(tag: str) -> bool:
    prefix, _, kind = tag.rpartition(":")
    return prefix == "tag:yaml.org,2002" and kind in ("str", "map", "seq")


def _scalar(event: Any) -> Any:
    text: str = event.value
    plain = event.implicit[0] and event.tag is None
    if not plain:
        return text
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text, 8)
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1))
    if _TIMESTAMP.fullmatch(text):
        return Timestamp(text)
    return text


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
