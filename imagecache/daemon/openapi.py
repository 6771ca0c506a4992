"""The OpenAPI document of the control API, made from the declared operations.

Pure. The schemas of answers are here; those of bodies and queries come from their fields, which
are also what checks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from imagecache.daemon.bodies import body_schema
from imagecache.daemon.operations import JSON, Operation

EVENTS = "text/event-stream"
PROBLEM = "application/problem+json"
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_TEXT: dict[str, Any] = {"type": "string"}
_MAYBE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_NUMBER: dict[str, Any] = {"type": "number"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT}
_OBJECT: dict[str, Any] = {"type": "object"}
_MAYBE_OBJECT: dict[str, Any] = {"type": ["object", "null"]}


def _record(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(name: str, of: str) -> dict[str, Any]:
    items = {"$ref": f"#/components/schemas/{of}"}
    return _record(**{name: {"type": "array", "items": items}})


SCHEMAS: dict[str, dict[str, Any]] = {
    "Problem": _record(
        type=_TEXT,
        title=_TEXT,
        status={"type": "integer", "minimum": 400, "maximum": 599},
        detail=_TEXT,
        kind=_TEXT,
        message=_TEXT,
        remedy=_MAYBE_TEXT,
        request=_TEXT,
    ),
    "Health": _record(status=_TEXT),
    "Status": _record(
        ready=_FLAG, realm=_TEXT, store=_TEXT, exports=_COUNT, host=_TEXT, started=_NUMBER
    ),
    "Export": _record(
        name=_TEXT,
        uri=_TEXT,
        socket=_TEXT,
        own_socket=_FLAG,
        reference=_TEXT,
        image=_TEXT,
        block_image=_TEXT,
        fs=_TEXT,
        size_bytes=_COUNT,
        writable=_FLAG,
        clients=_COUNT,
        state={"enum": ["serving", "failed"]},
        failure=_MAYBE_TEXT,
        stored=_FLAG,  # false: read from the builder's spool, whose uploads go on
        fill=_MAYBE_OBJECT,
        start=_MAYBE_OBJECT,
        config=_OBJECT,
    ),
    "Exports": _list("exports", "Export"),
    "Recording": _OBJECT,
    "StartReport": _record(version=_COUNT, export=_TEXT, reads=_COUNT),
    "Preload": _record(
        id=_TEXT,
        image=_TEXT,
        state={"enum": ["queued", "paused", "running", "done", "failed", "cancelled"]},
        owner=_TEXT,
        priority={"type": "integer"},
        pin_seconds=_COUNT,
        limit_bytes_per_second=_COUNT,
        warm={"enum": ["", "hot", "whole"]},
        submitted=_NUMBER,
        attempts=_COUNT,
        version=_COUNT,
        readable=_FLAG,  # it can be exported, though it may not be stored yet
        progress=_MAYBE_OBJECT,
        result=_MAYBE_OBJECT,
        error=_MAYBE_OBJECT,
    ),
    "Preloads": _list("preloads", "Preload"),
    "Plan": _record(
        image=_TEXT,
        digest=_TEXT,
        present=_FLAG,
        layers=_COUNT,
        missing_layers=_COUNT,
        total_bytes=_COUNT,
        missing_bytes=_COUNT,
        download_bytes=_COUNT,
        store_bytes_estimate=_COUNT,
        seconds_estimate={"type": ["number", "null"]},
        month_cost_estimate={"type": ["number", "null"]},
        once_cost_estimate={"type": ["number", "null"]},
    ),
    "Plans": _list("plans", "Plan"),
    "Image": _record(
        names=_TEXTS,
        image=_TEXT,
        block_image=_TEXT,
        fs=_TEXT,
        platform=_TEXT,
        size_bytes=_COUNT,
        packed_bytes=_COUNT,
        chunks=_COUNT,
        layers=_COUNT,
    ),
    "Images": _list("images", "Image"),
    "Dropped": _record(image=_TEXT, dropped=_TEXTS),
    "Profile": _record(
        image=_TEXT,
        repository=_TEXT,
        own=_FLAG,
        recordings=_COUNT,
        files=_COUNT,
        bytes=_COUNT,
        boot_pack=_MAYBE_OBJECT,
    ),
    "Pin": _record(image=_TEXT, name=_TEXT, ttl_seconds=_COUNT, seconds_left=_COUNT),
    "Pins": _list("pins", "Pin"),
    "Lease": _record(
        purpose={"enum": ["build", "read", "collect"]},
        holder=_TEXT,
        images=_TEXTS,
        ttl_seconds=_COUNT,
        seconds_left=_COUNT,
    ),
    "Leases": _list("leases", "Lease"),
    "Cache": _record(
        arena=_OBJECT, reads=_OBJECT, fetched=_OBJECT, sources=_OBJECT, loop=_MAYBE_OBJECT
    ),
    "Store": _record(
        url=_TEXT,
        realm=_TEXT,
        generations={"type": "array", "items": _record(number=_COUNT, state=_TEXT)},
        reads=_OBJECT,
    ),
    "Account": _record(
        images={"type": "array", "items": _OBJECT},
        logical_bytes=_COUNT,
        unique_bytes=_COUNT,
        stored_bytes=_COUNT,
        dedup=_NUMBER,
        objects=_COUNT,
        packs=_COUNT,
        pack_bytes=_COUNT,
        garbage_pack_bytes=_COUNT,
    ),
    "OpenApi": _OBJECT,
    "Upgrade": _record(pid=_COUNT),
}


def document(operations: Iterable[Operation]) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for item in operations:
        paths.setdefault(item.path, {})[item.method.lower()] = _operation(item)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cubecache control API",
            "version": version("cubecache"),
            "description": (
                "Errors are problem documents (RFC 9457). A POST with an Idempotency-Key may be "
                "repeated: the first answer is given again."
            ),
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(item: Operation) -> dict[str, Any]:
    answers = {str(status): _answer(kind) for status, kind in item.answers.items()}
    if item.streams:
        answers["200"]["content"][EVENTS] = {"schema": {"type": "string"}}
    problems = set(item.problems)
    if item.role is not None:
        problems |= {400, 401, 403}
    if item.body is not None:
        problems |= {400, 408, 413, 415, 422}
    for status in sorted(problems - item.answers.keys()):
        answers[str(status)] = _answer("Problem", PROBLEM)
    made: dict[str, Any] = {
        "operationId": item.identity,
        "summary": item.summary,
        "responses": answers,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)\}", item.path)
        ],
    }
    for field in item.query:
        schema = field.schema()
        if isinstance(schema["type"], list):
            schema["type"] = schema["type"][0]
        made["parameters"].append(
            {"name": field.name, "in": "query", "required": field.required, "schema": schema}
        )
    if item.method == "POST":
        made["parameters"].append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
            }
        )
    if item.role is not None:
        made["security"] = [{"token": []}]
        made["description"] = f"Role: {item.role.name.lower()}."
    if item.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": body_schema(item.body)}},
        }
    return made


def _answer(kind: str | None, media: str = JSON) -> dict[str, Any]:
    if kind is None:
        return {"description": "Done."}
    if "/" in kind:
        return {"description": kind, "content": {kind: {"schema": {"type": "string"}}}}
    schema = {"$ref": f"#/components/schemas/{kind}"}
    return {"description": kind, "content": {media: {"schema": schema}}}
