"""Debian's Prometheus scrapes a real daemon, and every query of the dashboard has an answer."""

import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagemaker.entries import Entry, write_tar
from kits.httpapi import free_port, write_tokens
from kits.image import write_tars
from kits.journey import Cubecache
from testbed.browser import until
from testbed.processes import Stage

DASHBOARD = Path(__file__).parents[2] / "packaging/grafana/cubecache.json"
SCRAPE_SECONDS = 1


def queries() -> list[str]:
    """The dashboard's, as Grafana would send them for all instances."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "30s")
        for panel in panels
        for target in panel["targets"]
    ]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    (tmp_path / "stage").mkdir()
    with Stage(tmp_path / "stage") as stage:
        yield stage


def ask(port: int, query: str) -> list[Any]:
    words = urllib.parse.urlencode({"query": query})
    url = f"http://127.0.0.1:{port}/api/v1/query?{words}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    return list(found["data"]["result"])


def test_every_query_of_the_dashboard_returns_data(stage: Stage, tmp_path: Path) -> None:
    """A preload, an export that is read, and two scrapes: then every panel has a line."""
    tar = write_tar([Entry("large", content=os.urandom(3 << 20))])
    image = write_tars(tmp_path / "image", [tar])
    api = free_port()
    environment = {
        "CUBECACHE_API_TCP": f"127.0.0.1:{api}",
        "CUBECACHE_API_TOKENS": str(write_tokens(tmp_path / "tokens.toml")),
        "CUBECACHE_CACHE_FILL": "none",
    }
    installed = Cubecache(stage, tmp_path / "state", environment=environment)
    daemon = installed.serve()
    installed.run("preload", image)
    uri = daemon.export(image)
    config = tmp_path / "prometheus.yml"
    config.write_text(
        f"scrape_configs:\n- job_name: cubecache\n  scrape_interval: {SCRAPE_SECONDS}s\n"
        f"  authorization: {{credentials: {'reader' * 9}}}\n"
        f"  static_configs: [{{targets: ['127.0.0.1:{api}']}}]\n"
    )
    port = free_port()
    stage.start(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
    )
    until(lambda: _answers(port, "up{job='cubecache'} == 1"), "a first scrape")
    read = ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(tmp_path / "disk")]
    subprocess.run(read, check=True, timeout=120)
    unanswered = queries()
    assert len(unanswered) > 35
    deadline = time.monotonic() + 90
    while unanswered:
        unanswered = [query for query in unanswered if not ask(port, query)]
        assert time.monotonic() < deadline, unanswered
        time.sleep(SCRAPE_SECONDS / 2)
    waits = ask(port, "sum(cubecache_stall_seconds_count)")
    assert float(waits[0]["value"][1]) > 0
    assert re.fullmatch(
        r"[1-9]\d*", ask(port, 'sum(cubecache_builds_total{end="built"})')[0]["value"][1]
    )
    daemon.stop()


def _answers(port: int, query: str) -> bool:
    try:
        return bool(ask(port, query))
    except OSError:
        return False
