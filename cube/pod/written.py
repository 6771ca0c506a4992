"""What all written models share: strictness, names, and references to other documents. Pure."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

Ignored = Any
Texts = dict[str, str]


class Written(BaseModel):
    """Base: strict types, camelCase names, nothing unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", alias_generator=to_camel)


class KeyRef(Written):
    name: str
    key: str
    optional: bool = False


class FieldRef(Written):
    field_path: str
    api_version: Literal["v1"] = "v1"


class ResourceFieldRef(Written):
    resource: str
    container_name: str | None = None
    divisor: str | int | None = None


class NamedRef(Written):
    name: str
    optional: bool = False
