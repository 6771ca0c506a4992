"""The OpenAPI document against the routes, its own specification, and generated requests."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagemaker.entries import Entry
from kits.image import write_image
from openapi_spec_validator import validate

from imagecache.daemon.api import application, declared_operations
from imagecache.daemon.bodies import Field, checked, query_values
from imagecache.daemon.openapi import SCHEMAS, document
from imagecache.daemon.service import Service
from imagecache.errors import UsageError

BIN = Path(__file__).parents[2] / ".venv/bin"


@pytest.mark.quick
def test_document_is_openapi_and_names_every_schema() -> None:
    made = document(declared_operations())
    validate(made)
    used = set(re.findall(r"#/components/schemas/(\w+)", str(made)))
    assert used == set(SCHEMAS)
    assert all(item.summary.endswith(".") for item in declared_operations())


async def test_document_and_routes_are_the_same(service: Service) -> None:
    """Every route is declared and every declaration is routed."""
    routed = {
        (route.method, route.resource.canonical)
        for route in application(service).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    declared = {(item.method, item.path) for item in declared_operations()}
    assert routed == declared


@pytest.mark.quick
def test_bodies_and_queries_are_checked_as_described() -> None:
    """I2: unknown, missing, mistyped; a boolean for a number; 1e400; negative; over the bound."""
    fields = (
        Field("t", "text", "", required=True, pattern="[a-z]+"),
        Field("n", "number", "", most=10),
        Field("f", "flag", ""),
        Field("s", "texts", "", items=2),
    )
    assert checked({"t": "a"}, fields) == {"t": "a", "n": None, "f": None, "s": None}
    for wrong in (
        {},
        {"t": None},
        {"t": "A"},
        {"t": ""},
        {"t": "a\n"},
        {"t": "a", "n": True},
        {"t": "a", "n": -1},
        {"t": "a", "n": float("inf")},
        {"t": "a", "n": 11},
        {"t": "a", "f": 1},
        {"t": "a", "s": []},
        {"t": "a", "s": ["x", "y", "z"]},
        {"t": "a", "s": [1]},
        {"t": "a", "x": 1},
    ):
        with pytest.raises(UsageError):
            checked(wrong, fields)
    for query in ([("n", "nan")], [("n", "x")], [("f", "yes")], [("n", "1"), ("n", "1")]):
        with pytest.raises(UsageError):
            query_values([("t", "a"), *query], fields)


@contextlib.contextmanager
def daemon_over_tcp(folder: Path) -> Iterator[tuple[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    digest = hashlib.sha256(b"secret").hexdigest()
    (folder / "tokens").write_text(f'[tokens.t]\nrole = "admin"\nsha256 = "{digest}"\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUBECACHE_")} | {
        "CUBECACHE_STATE_DIR": str(folder / "state"),
        "CUBECACHE_API_TCP": f"127.0.0.1:{port}",
        "CUBECACHE_API_TOKENS": str(folder / "tokens"),
        "CUBECACHE_API_PRIVATE_IMAGES": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([BIN / "cubecache", "serve"], env=environment, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "/readyz"):
                break
            time.sleep(0.1)
        yield url, "secret"
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def furnished(url: str, token: str, folder: Path) -> tuple[str, str, str]:
    """An image, preloaded and exported: the export's name, the manifest's digest, the job's id."""
    image = write_image(folder, [[Entry("file", content=b"x" * 9000)]])

    def call(method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(url + path, method=method)
        request.add_header("Authorization", f"Bearer {token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    (job,) = call("POST", "/v1/preloads", {"images": [image]})["preloads"]
    deadline = time.monotonic() + 120
    while job["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        job = call("GET", f"/v1/preloads/{job['id']}?wait=5&since={job['version']}")
    export = call("POST", "/v1/exports", {"image": image})
    # Schemas allow more than they name: here they name all that is answered.
    for answer, schema in ((job, "Preload"), (export, "Export")):
        assert set(answer) == set(SCHEMAS[schema]["properties"]), schema
    return export["name"], job["result"]["image"], job["id"]


@pytest.mark.parametrize("examples", [pytest.param(5), pytest.param(300, marks=pytest.mark.soak)])
def test_generated_requests_get_documented_answers(tmp_path: Path, examples: int) -> None:
    """I1-I3: what schemathesis makes of the document; every answer is one that it describes.

    Left out: POST /v1/upgrade, which does what it says to the daemon that is asked, and
    GET /v1/events, whose answer lasts as long as somebody watches (test_daemon_events.py);
    `unsupported_method` expects 405 where a proxy method (TRACE) reaches no handler of
    ours, and `positive_data_acceptance` would have every well-formed reference exist.
    """
    # 503 is the documented answer where a registry cannot be asked; 500 never is.
    statuses = '["2xx", "4xx", "503"]'
    with daemon_over_tcp(tmp_path) as (url, token):
        name, digest, job = furnished(url, token, tmp_path / "image")
        # What is there is asked for, and the export is not ended by whoever comes first.
        (tmp_path / "schemathesis.toml").write_text(
            f"[checks.not_a_server_error]\nexpected-statuses = {statuses}\n"
            f'[parameters]\n"path.name" = "{name}"\n"path.image" = "{digest}"\n'
            f'"path.id" = "{job}"\n'
            '[[operations]]\ninclude-name = "DELETE /v1/exports/{name}"\n'
            'parameters = { "path.name" = "absent" }\n'
        )
        outcome = subprocess.run(
            [
                BIN / "schemathesis",
                f"--config-file={tmp_path / 'schemathesis.toml'}",
                "run",
                f"{url}/v1/openapi.json",
                f"--header=Authorization: Bearer {token}",
                f"--max-examples={examples}",
                "--seed=1",
                "--checks=all",
                "--exclude-checks=unsupported_method,positive_data_acceptance",
                "--max-response-time=60",
                "--phases=examples,coverage,fuzzing",
                "--exclude-path=/v1/upgrade",
                "--exclude-path=/v1/events",
                "--no-color",
                "--request-timeout=30",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=1200,
        )
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert "Traceback" not in (tmp_path / "log").read_text()
