"""Record, store, stream, explain: each host with a daemon of its own, by a real NBD client."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import nbd
import pytest
from imagemaker.entries import Entry, directory
from imagemaker.layout import Settings as RunSettings
from kits.image import write_image
from kits.journey import Cubecache
from testbed.processes import Stage

HOSTILE = "lib/<script>alert(1)</script>&\x1b[31m\udcff"


def entries(version: int) -> list[list[Entry]]:
    files = [directory("lib"), directory("bin")]
    files += [Entry(f"lib/f{n:02}", content=bytes([n + version, 7]) * 200_000) for n in range(40)]
    files.append(Entry(HOSTILE, content=b"x" * 300_000))
    return [files]


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.fixture
def image(tmp_path: Path) -> str:
    return write_image(tmp_path / "image", entries(1), RunSettings(command=("/bin/none",)))


@pytest.fixture
def host(stage: Stage) -> Callable[[str], Cubecache]:
    """Hosts with nothing of their own, all before one store."""

    def install(name: str) -> Cubecache:
        return Cubecache(stage, stage.folder / name, (stage.folder / "store").as_uri())

    return install


def read(uri: str, spans: list[tuple[int, int]]) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    for offset, length in spans:
        client.pread(length, offset)
    client.shutdown()


def span_of(host: Cubecache, image: str, path: str) -> tuple[int, int]:
    found = host.run("inspect", image, path, "--json").json()
    return found["offset_bytes"], found["size_bytes"]


def export_named(host: Cubecache, image: str, *arguments: str) -> dict:
    return host.run("export", image, "--json", *arguments).json()


class Page(HTMLParser):
    """What a browser would run or fetch of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.links += [f"{k}={v}" for k, v in attrs if k in ("src", "href") or k.startswith("on")]


def test_a_recorded_start_is_streamed_to_the_next_host(host, image: str) -> None:
    """Recording, profile, boot pack, stream: what one host read, the next one has at once."""
    first = host("first")
    first.preload(image)
    wanted = [span_of(first, image, f"/lib/f{n:02}") for n in (31, 4, 17)]
    first.serve()
    made = export_named(first, image, "--record", "--fill", "none")
    read(made["uri"], [(0, 4096), *wanted])
    state = first.run("profile", "record", made["name"], "--stop", "--json").json()
    assert state["recording"] == "saved", state
    known = first.run("profile", "show", image, "--json").json()
    assert known["recordings"] == 1
    assert [t["path"] for t in known["touches"]] == ["lib/f31", "lib/f04", "lib/f17"]

    second = host("second")
    second.serve()
    made = export_named(second, image, "--fill", "hot")
    for _ in range(100):
        (found,) = second.run("exports", "--json").json()
        if found["start"]["streamed"]:
            break
    assert found["start"]["source"] == "profile"
    assert found["start"]["streamed"]["error"] is None
    read(made["uri"], wanted)
    report = second.run("explain", made["name"], "--json").json()
    assert report["ahead"]["hit_rate"] == 1.0
    assert {stall["cause"] for stall in report["stalls"]["listed"]} <= {"first-use"}


def test_a_start_without_help_is_explained(host, image: str, tmp_path: Path) -> None:
    """Each wait has its time, offset, file, tier and cause; the page needs nothing from outside."""
    cold = host("cold")
    cold.preload(image)
    wanted = [span_of(cold, image, f"/lib/f{n:02}") for n in (3, 30)]
    metadata = (0, 4096)
    cold.serve()
    made = export_named(cold, image, "--fill", "none")
    read(made["uri"], [metadata, *wanted])
    report = cold.run("explain", made["name"], "--json").json()
    stalls = report["stalls"]["listed"]
    assert [stall["path"] for stall in stalls] == ["(metadata)", "/lib/f03", "/lib/f30"]
    assert [stall["offset"] for stall in stalls] == [0, wanted[0][0], wanted[1][0]]
    assert all(s["cause"] == "cold" and s["tier"] == "store" and s["seconds"] > 0 for s in stalls)
    assert report["touched_bytes"] == 4096 + 2 * (wanted[0][1] + -wanted[0][1] % 4096)
    assert report["amplification"]["fetched_bytes"] > 0
    assert report["ahead"]["chunks"] == 0
    text = cold.run("explain", made["name"]).out
    assert "/lib/f30" in text
    page = tmp_path / "start.html"
    cold.run("explain", made["name"], "--html", str(page))
    content = page.read_text()
    parsed = Page()
    parsed.feed(content)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert parsed.links == []
    assert not re.search(r"https?:|url\(|@import", content)
    assert {"svg", "style", "table"} <= parsed.tags


def test_hostile_names_stay_names(host, image: str, tmp_path: Path) -> None:
    """A file name with markup, an escape sequence and a broken byte reaches no terminal or page."""
    cold = host("cold")
    cold.preload(image)
    files = cold.run("inspect", image, "/lib/f39", "--json").json()
    cold.serve()
    made = export_named(cold, image, "--fill", "none")
    # The hostile name sorts first in its directory: its content lies before that of f00.
    begin = span_of(cold, image, "/lib/f00")[0]
    read(made["uri"], [(begin - 4096, 4096)])
    report = cold.run("explain", made["name"], "--json").json()
    assert report["stalls"]["listed"][0]["path"].startswith("/lib/<script>"), report["stalls"]
    page = tmp_path / "start.html"
    cold.run("explain", made["name"], "--html", str(page))
    parsed = Page()
    parsed.feed(page.read_text())
    assert "script" not in parsed.tags
    assert "\x1b" not in cold.run("explain", made["name"]).out
    assert files["size_bytes"] == 400_000


def test_counterfactual_with_todays_profile(host, image: str) -> None:
    """After a recording, the same cold start is told what it would have waited."""
    cold = host("cold")
    cold.preload(image)
    wanted = [span_of(cold, image, f"/lib/f{n:02}") for n in range(0, 40, 2)]
    cold.serve()
    made = export_named(cold, image, "--record", "--fill", "none")
    read(made["uri"], wanted)
    cold.run("profile", "record", made["name"], "--stop")
    report = cold.run("explain", made["name"], "--json").json()
    found = report["counterfactual"]
    assert found["stalls_not_covered"] == 0
    assert found["wall_seconds_with_profile"] <= found["wall_seconds"]
    assert found["recordings"] == 1


def test_two_recordings_merge(host, image: str) -> None:
    first = host("first")
    first.preload(image)
    spans = [span_of(first, image, f"/lib/f{n:02}") for n in (1, 2, 3)]
    first.serve()
    made = export_named(first, image, "--record", "--fill", "none")
    read(made["uri"], spans[:2])
    first.run("profile", "record", made["name"], "--stop")
    first.run("profile", "record", made["name"], "--detach")
    read(made["uri"], spans[1:])
    first.run("profile", "record", made["name"], "--stop")
    known = first.run("profile", "show", image, "--json").json()
    assert known["recordings"] == 2
    seen = {t["path"]: t["seen"] for t in known["touches"]}
    assert seen == {"lib/f01": 1, "lib/f02": 2, "lib/f03": 1}


def test_a_recording_ends_by_its_time(host, image: str) -> None:
    first = host("first")
    first.preload(image)
    span = span_of(first, image, "/lib/f01")
    first.serve()
    made = export_named(first, image, "--fill", "none")
    first.run("profile", "record", made["name"], "--seconds", "1", "--detach")
    assert first.run("profile", "record", made["name"], expect=75).code == 75
    read(made["uri"], [span])
    for _ in range(100):
        (found,) = first.run("exports", "--json").json()
        if found["start"]["recording"] == "saved":
            break
    assert found["start"]["recording"] == "saved"


def test_apply_carries_a_profile_to_another_image(host, image: str, tmp_path: Path) -> None:
    other = write_image(tmp_path / "other", entries(2), RunSettings(command=("/bin/none",)))
    first = host("first")
    first.preload(image)
    first.preload(other)
    span = span_of(first, image, "/lib/f09")
    first.serve()
    made = export_named(first, image, "--record", "--fill", "none")
    read(made["uri"], [span])
    first.run("profile", "record", made["name"], "--stop")
    known = first.run("profile", "apply", image, other, "--json").json()
    assert [t["path"] for t in known["touches"]] == ["lib/f09"]
    assert known["boot_pack"]["chunks"] > 0
    built = first.run("profile", "build", other, "--json").json()
    assert built["profile"] == known["profile"]


def test_what_is_not_there_is_said(host, image: str) -> None:
    first = host("first")
    assert first.run("explain", "nothing", expect=None).code == 69
    assert first.run("profile", "show", image, expect=None).code == 66
    first.preload(image)
    first.serve()
    assert first.run("explain", "nothing", expect=None).code == 66
    answer = first.run("profile", "record", "nothing", "--json", expect=66)
    assert json.loads(answer.out)["error"]["kind"] == "NotFound"
