"""What Prometheus and the dashboard see."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imagecache.buckets import BOUNDS, Buckets
from imagecache.composition import ImageRequest
from imagecache.daemon import metrics
from imagecache.daemon.exports import LiveExport
from imagecache.daemon.metrics import OTHERS, exposition
from imagecache.daemon.service import ExportRequest, Service
from imagecache.daemon.watched import Watched

DASHBOARD = Path(__file__).parents[2] / "packaging/grafana/cubecache.json"


async def exported(service: Service, built: str) -> LiveExport:
    return await service.export(ExportRequest(ImageRequest.parse(built, None, "erofs")))


async def test_every_metric_has_help_and_the_dashboard_asks_for_what_is_there(
    service: Service, built: str
) -> None:
    await exported(service, built)
    watched = Watched(service)
    watched.timings.by_operation["status"].add(0.01)
    watched.realm.collections(0)
    for _ in range(600):
        if watched.realm.collections(60) is not None:
            break
        await asyncio.sleep(0.1)
    families = list(text_string_to_metric_families(exposition(service, watched)))
    await watched.realm.close()
    assert all(len(family.documentation) > 10 for family in families)
    samples = {sample.name for family in families for sample in family.samples}
    labels = {
        label for family in families for sample in family.samples for label in sample.labels
    } | {"instance"}
    for family in families:  # what a high value means, or that it is good
        told = family.documentation.lower()
        means = (
            "high",
            "any",
            "near",
            "lower",
            "none",
            "many",
            "rise",
            "far",
            "at ",
            "1 ",
            "these",
        )
        assert family.name.startswith("process_") or any(word in told for word in means), told
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for t in targets for name in re.findall(r"cubecache_\w+", t["expr"])}
    assert len(targets) > 35
    assert asked <= samples, asked - samples
    used = {label for t in targets for label in re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])}
    assert used <= labels


async def test_labels_are_escaped_and_bounded(
    service: Service, built: str, monkeypatch: object
) -> None:
    """I15: a hostile name is one label of one series; past the bound exports are summed."""
    first = await exported(service, built)
    hostile = 'a"} 1\ncubecache_evil{x="'
    for number in range(metrics.EXPORT_SERIES + 20):
        name = hostile if number == 0 else f"e{number}"
        copy = dataclasses.replace(first, record=dataclasses.replace(first.record, name=name))
        service._live[name] = copy
    families = {
        family.name: family for family in text_string_to_metric_families(exposition(service))
    }
    assert "cubecache_evil" not in families
    names = {s.labels["export"] for s in families["cubecache_export_misses"].samples}
    assert len(names) == metrics.EXPORT_SERIES + 1
    assert {OTHERS, hostile} <= names
    for name in [name for name in service._live if name != first.record.name]:
        del service._live[name]


@pytest.mark.quick
def test_buckets_count_up_to_each_bound() -> None:
    times = Buckets()
    assert times.quantile(0.99) is None
    for seconds in (0.0, BOUNDS[0], 0.02, 99.0):
        times.add(seconds)
    found = dict(times.cumulative())
    assert (found[str(BOUNDS[0])], found["0.01"], found["0.025"]) == (2, 2, 3)
    assert (found["30.0"], found["+Inf"], times.count) == (3, 4, 4)
    assert times.quantile(0.5) == BOUNDS[0]
    assert times.quantile(1.0) == BOUNDS[-1]
