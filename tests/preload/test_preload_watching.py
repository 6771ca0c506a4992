"""`cubecache watch`: versions in order, tags in pages, and a real registry that gets new ones."""

import json
import random
from pathlib import Path

import pytest
from imagemaker.entries import Entry
from imagemaker.layout import push
from kits.image import write_image
from kits.registry_process import RegistryProcess
from kits.registry_server import Reply, Request, ScriptedServer
from kits.upgrading import ServedHost

from imagecache.errors import LimitExceeded
from imagecache.oci.reference import RegistryReference, parse_reference
from imagecache.oci.registry import RegistrySource
from imagecache.oci.settings import RegistrySettings
from preload.watching import MOST_SECONDS, Rule, pause_seconds, version_key


@pytest.mark.quick
def test_versions_are_ordered_as_people_number_them() -> None:
    wanted = ["v0.9", "v1.0-rc1", "v1.0-rc2", "v1.0", "v1.0.1", "v1.9", "v1.10", "v2"]
    for seed in range(20):
        mixed = random.Random(seed).sample(wanted, len(wanted))
        assert sorted(mixed, key=version_key) == wanted
    repository = parse_reference("r.example/team/app")
    assert isinstance(repository, RegistryReference)
    rule = Rule(repository, ("v1*", "latest"), 3)
    assert rule.chosen([*wanted, "latest"]) == ["v1.10", "v1.9", "v1.0.1"]


@pytest.mark.quick
def test_looks_are_spread_and_back_off() -> None:
    assert [round(pause_seconds(100, 0, chance)) for chance in (0, 0.5, 1)] == [80, 100, 120]
    assert pause_seconds(100, 3, 0.5) == 800
    assert pause_seconds(100, 1000, 0.5) == MOST_SECONDS
    assert pause_seconds(10 * MOST_SECONDS, 5, 0.5) == 10 * MOST_SECONDS


async def test_tags_come_in_pages_and_no_page_leads_elsewhere() -> None:
    """The next page's link gives a query, never a place; what is no tag is left out."""
    pages = {"n=1000": (["a", "b", 7, "../x"], "b"), "last=b": (["b", "c"], None)}

    def answer(request: Request) -> Reply:
        tags, after = pages[request.query]
        headers = {"Content-Type": "application/json"}
        if after:
            headers["Link"] = f'<http://elsewhere.example/v2/x/tags/list?last={after}>; rel="next"'
        return Reply(200, json.dumps({"name": "app", "tags": tags}).encode(), headers)

    def endless(request: Request) -> Reply:
        link = '</v2/endless/tags/list?n=1>; rel="next"'
        return Reply(200, b'{"tags": null}', {"Link": link})

    async with ScriptedServer() as server:
        server.routes["/v2/app/tags/list"] = answer
        server.routes["/v2/endless/tags/list"] = endless
        for name, found in (("app", ["a", "b", "c"]), ("endless", None)):
            reference = parse_reference(f"{server.host}/{name}")
            assert isinstance(reference, RegistryReference)
            source = RegistrySource(reference, RegistrySettings())
            try:
                if found is None:
                    with pytest.raises(LimitExceeded):
                        await source.tags()
                else:
                    assert await source.tags() == found
            finally:
                await source.close()


def test_new_and_moved_tags_are_preloaded(tmp_path: Path) -> None:
    """Nothing for what is here; a new version and a moved tag; a registry that is away."""

    def version(number: int) -> str:
        folder = tmp_path / f"v{number}"
        base = [Entry("base", content=random.Random(0).randbytes(200_000))]
        write_image(folder, [base, [Entry("app", content=f"{number}".encode() * 10_000)]])
        return str(folder)

    def looked(host: ServedHost, *more: str) -> list[str]:
        lines = host.cubecache("watch", repository, "--tags", "v*", "--once", "--json", *more)
        return [json.loads(line)["name"].rpartition(":")[2] for line in lines.splitlines()]

    registry = RegistryProcess(tmp_path / "registry")
    with registry, ServedHost(tmp_path / "state") as host:
        repository = f"{registry.host}/team/app"
        for number in (1, 2, 10):
            push(Path(version(number)), "latest", f"{repository}:v1.{number}")
        host.serve()
        assert looked(host, "--newest", "2") == ["v1.2", "v1.10"]
        assert looked(host, "--newest", "2") == []
        push(Path(version(11)), "latest", f"{repository}:v1.11")
        push(Path(version(12)), "latest", f"{repository}:v1.10")
        assert looked(host, "--newest", "2") == ["v1.10", "v1.11"]
        host.stop()
        assert looked(host, "--newest", "4") == ["v1.1"]
    assert host.outcome("watch", repository, "--once").returncode == 69
    assert host.outcome("watch", f"{repository}:v1", "--once").returncode == 2
