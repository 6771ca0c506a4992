"""The API's operations: what each is, who may call it, what it takes and answers.

A handler is declared once, with `operation`; the routes, the checks and the OpenAPI document all
come from that declaration.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from imagecache.daemon.access import Caller, Role
from imagecache.daemon.bodies import Field

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request: who, what, and the fields of body and query."""

    request: web.Request
    caller: Caller
    body: dict[str, Any] = field(default_factory=dict)
    query: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The path's one parameter."""
        return next(iter(self.request.match_info.values()))


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path; `answers` maps a status to a schema's name or a media type.

    One that `streams` answers 200 as server-sent events too, where a client accepts them.
    """

    method: str
    path: str
    identity: str
    summary: str
    role: Role | None
    body: tuple[Field, ...] | None
    query: tuple[Field, ...]
    answers: Mapping[int, str | None]
    problems: tuple[int, ...]
    streams: bool = False


Handler = Callable[[Any, Call], Awaitable[web.StreamResponse]]
H = TypeVar("H", bound=Handler)


def operation(
    method: str,
    path: str,
    *,
    role: Role | None,
    body: tuple[Field, ...] | None = None,
    query: tuple[Field, ...] = (),
    answers: Mapping[int, str | None],
    problems: tuple[int, ...] = (),
    streams: bool = False,
) -> Callable[[H], H]:
    """Declares a handler; its docstring is the summary. `role` None: nobody needs to be known."""

    def declare(handler: H) -> H:
        summary = (handler.__doc__ or "").strip()
        declared = Operation(
            method, path, handler.__name__, summary, role, body, query, answers, problems, streams
        )
        handler.operation = declared  # type: ignore[attr-defined]  # a mark on a function
        return handler

    return declare


def operations_of(routes: object) -> list[tuple[Operation, Callable[[Call], Awaitable[Any]]]]:
    """Every declared handler of an object, in the order of declaration."""
    found = []
    for kind in reversed(type(routes).__mro__):
        for name, member in vars(kind).items():
            declared = getattr(member, "operation", None)
            if declared is not None:
                found.append((declared, getattr(routes, name)))
    return found
