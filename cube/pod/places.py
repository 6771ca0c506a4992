"""Where in a manifest something stands, so that a refusal can say it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from cube.pod.yamltree import Document, Path, Timestamp
from imagecache.errors import Denied, LimitExceeded, Rejected

SHOWN: Final = 10  # problems named in one message
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_LABEL = re.compile(_LABEL)
_DNS_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_KINDS: Final = {
    bool: "a boolean",
    int: "a whole number",
    float: "a fraction",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "nothing",
    Timestamp: "a date",
}
_WANTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
M = TypeVar("M", bound=BaseModel)
C = TypeVar("C", bound=str)


@dataclass(frozen=True, slots=True)
class Place:
    """A path in one document."""

    document: Document
    path: Path = ()
    whole: str = ""  # the object: "pod web"

    def __truediv__(self, part: str | int) -> Place:
        return Place(self.document, (*self.path, part), self.whole)

    def __str__(self) -> str:
        where = f"{self.whole}: " if self.whole else ""
        return f"line {self.document.line(self.path)}: {where}{path_text(self.path)}"

    def reject(self, problem: str, *, remedy: str | None = None) -> NoReturn:
        """Raises Rejected with line and field."""
        raise Rejected(f"{self} {problem}", remedy=remedy)

    def limit(self, problem: str) -> NoReturn:
        """Raises LimitExceeded with line and field."""
        raise LimitExceeded(f"{self} {problem}")

    def deny(self, problem: str, *, remedy: str | None = None) -> NoReturn:
        """Raises Denied with line and field."""
        raise Denied(f"{self} {problem}", remedy=remedy)

    def name(self, text: str, *, dots: bool = False) -> str:
        """The text itself if it is a DNS label of at most 63 bytes (a name: 253)."""
        pattern, limit = (_DNS_NAME, 253) if dots else (_DNS_LABEL, 63)
        if len(text) > limit:
            self.limit(f"has {len(text)} characters, over {limit}")
        if not pattern.fullmatch(text):
            self.reject(
                f"{text[:70]!r} is not a DNS {'name' if dots else 'label'}: "
                "lower-case letters, digits and - between them"
            )
        return text

    def between(self, number: int, low: int, high: int) -> int:
        """The number itself if it is in the range."""
        if not low <= number <= high:
            self.limit(f"is {number}; it can be {low} to {high}")
        return number


def one_of(choices: tuple[C, ...], text: str | None, place: Place) -> C | None:
    """The text itself if it is one of them; None where there is none."""
    found = next((one for one in choices if one == text), None)
    if text is not None and found is None:
        place.reject(f"is {text[:70]!r}; it can be {', '.join(choices)}")
    return found


def read(kind: type[M], place: Place, value: Any) -> M:
    """The value as a written model; raises Rejected naming each field that does not fit."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [_problem(place, dict(one)) for one in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"... and {len(found) - SHOWN} more")
        raise Rejected("\n".join(dict.fromkeys(lines))) from None


def path_text(path: Path) -> str:
    """A path as people write it: spec.containers[0].image."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "the document"


def _problem(place: Place, error: dict[str, Any]) -> str:
    steps = [step for step in error["loc"] if isinstance(step, int) or not _is_union(step)]
    here = place
    for step in steps:
        here /= step
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{here} is not supported"
    if kind == "missing":
        return f"{Place(place.document, here.path[:-1], place.whole)} has no {steps[-1]}"
    if kind in _WANTED:
        quote = "; quote it" if kind == "string_type" and not isinstance(value, dict | list) else ""
        given = _KINDS.get(type(value), "something else")
        return f"{here} must be {_WANTED[kind]}, not {given}{quote}"
    if kind == "literal_error":
        shown = repr(value)[:60] if isinstance(value, str) else _KINDS.get(type(value), "that")
        return f"{here} is {shown}: {error['msg'].lower().replace('input ', 'it ')}"
    return f"{here}: {error['msg'].lower()}"


def _is_union(step: str) -> bool:
    """Pydantic names a union's members in its paths; the manifest does not have those."""
    return step in ("str", "int", "float", "list[str]", "bool")
