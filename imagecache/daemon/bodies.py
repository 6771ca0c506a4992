"""Bodies and query parameters: one description that both checks them and is documented (OpenAPI).

Pure. A description is a tuple of `Field`s; `checked` gives every field, None where left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagecache.errors import UsageError

_JSON_TYPES = {"text": "string", "texts": "array", "flag": "boolean", "number": "number"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `kind` is text, texts (a list), flag or number; bounds are inclusive."""

    name: str
    kind: str
    text: str
    required: bool = False
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    least: float = 0
    most: float = 1024
    items: int = 1000

    def schema(self) -> dict[str, Any]:
        """Its JSON schema; what is not required may be null."""
        kind = _JSON_TYPES[self.kind]
        schema: dict[str, Any] = {
            "type": kind if self.required else [kind, "null"],
            "description": self.text,
        }
        if self.kind == "number":
            schema |= {"minimum": self.least, "maximum": self.most}
        elif self.kind == "text":
            schema |= self._text_schema()
            if self.choices and not self.required:
                schema["enum"] = [*self.choices, None]
        elif self.kind == "texts":
            schema |= {"items": {"type": "string"} | self._text_schema()}
            schema |= {"minItems": 1, "maxItems": self.items}
        return schema

    def _text_schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"minLength": 1, "maxLength": int(self.most)}
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.pattern:
            schema["pattern"] = f"^{self.pattern}$"
        return schema

    def fits(self, value: Any) -> bool:
        """Whether a JSON value is one of this field's."""
        if value is None:
            return not self.required
        if self.kind == "flag":
            return isinstance(value, bool)
        if self.kind == "number":
            return (
                type(value) in (int, float)
                and math.isfinite(value)
                and self.least <= value <= self.most
            )
        if self.kind == "text":
            return self._fits_text(value)
        return (
            isinstance(value, list)
            and 1 <= len(value) <= self.items
            and all(map(self._fits_text, value))
        )

    def _fits_text(self, value: Any) -> bool:
        if not isinstance(value, str) or not 1 <= len(value) <= self.most:
            return False
        if self.choices and value not in self.choices:
            return False
        return self.pattern is None or re.fullmatch(self.pattern, value) is not None


def body_schema(fields: Sequence[Field]) -> dict[str, Any]:
    """The JSON schema of an object of these fields and no others."""
    return {
        "type": "object",
        "properties": {field.name: field.schema() for field in fields},
        "required": [field.name for field in fields if field.required],
        "additionalProperties": False,
    }


def decoded(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body: no duplicate keys, no NaN; UsageError (I1, I4)."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError("the body is not a JSON object")
    return value


def checked(values: Mapping[str, Any], fields: Sequence[Field]) -> dict[str, Any]:
    """Every field of a body, None where left out; UsageError names the wrong ones (I2).

    Values are in no message: one may be a secret in the wrong place (I13).
    """
    known = {field.name: field for field in fields}
    wrong = [name for name in values if name not in known]
    wrong += [name for name, field in known.items() if not field.fits(values.get(name))]
    if wrong:
        names = ", ".join(sorted({repr(name[:64])[1:-1] for name in wrong})[:20])
        raise UsageError(f"missing, unknown or malformed fields: {names}")
    return {name: values.get(name) for name in known}


def query_values(query: Sequence[tuple[str, str]], fields: Sequence[Field]) -> dict[str, Any]:
    """Query parameters as their fields say; UsageError."""
    values: dict[str, Any] = {}
    kinds = {field.name: field.kind for field in fields}
    for name, text in query:
        value: Any = text
        if kinds.get(name) == "number":
            try:
                value = float(text) if text.isascii() else None
            except ValueError:
                value = ()
        elif kinds.get(name) == "flag":
            value = {"1": True, "true": True, "0": False, "false": False}.get(text, ())
        if name in values:
            raise UsageError(f"query parameter {name[:64]!r} stands twice")
        values[name] = () if value is None else value
    return checked(values, fields)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
