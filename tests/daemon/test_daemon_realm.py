"""The control API's images, pins, leases, profiles, cache and store, and who may see them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
from kits.httpapi import Remote, free_port, preloaded, served, write_tokens

from imagecache.daemon.api import declared_operations
from imagecache.daemon.openapi import document
from imagecache.settings import ApiSection, Settings


@pytest.fixture
async def remote(where: Settings, tmp_path: Path) -> AsyncIterator[Remote]:
    port = free_port()
    tokens = write_tokens(tmp_path / "tokens.toml")
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens), private_images=True)
    async with served(where, api), aiohttp.ClientSession() as session:
        yield Remote(session, f"http://127.0.0.1:{port}")


def as_documented(path: str, value: Any) -> Any:
    """An answer, once it is what the OpenAPI document says of it."""
    made = document(declared_operations())
    schema = made["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(value, {**schema, "components": made["components"]})
    return value


async def test_images_of_another_owner_are_not_there(remote: Remote, built: str) -> None:
    """I11: neither listed, nor shown, pinned or exported, as if nobody had preloaded them."""
    digest = await preloaded(remote, "a", built)
    for who, count in (("a", 1), ("b", 0), ("reader", 1)):
        status, answer = await remote.call(who, "GET", "/v1/images")
        assert status == 200
        assert len(as_documented("/v1/images", answer)["images"]) == count
        status, answer = await remote.call(who, "GET", f"/v1/images/{digest}")
        assert status == (200 if count else 404)
    _, hidden = await remote.call("b", "GET", f"/v1/images/{digest}")
    absent = "sha256:" + "0" * 64
    _, missing = await remote.call("b", "GET", f"/v1/images/{absent}")
    assert str(hidden).replace(digest, absent) == str(missing)
    for method, path, body in (
        ("GET", f"/v1/images/{digest}/profile", None),
        ("POST", "/v1/pins", {"image": digest, "seconds": 60}),
    ):
        assert (await remote.call("b", method, path, body))[0] == 404
    status, _ = await remote.call("b", "POST", "/v1/exports", {"image": built})
    assert status == 404
    assert await preloaded(remote, "b", built) == digest  # costs it a look-up, and is its own now
    assert (await remote.call("b", "POST", "/v1/exports", {"image": built}))[0] == 201
    assert len((await remote.call("b", "GET", "/v1/images"))[1]["images"]) == 1


async def test_pins_are_made_kept_and_removed(remote: Remote, built: str) -> None:
    """A pin is longer at most, unless an admin says otherwise; only an admin removes one."""
    digest = await preloaded(remote, "a", built)
    status, pin = await remote.call("a", "POST", "/v1/pins", {"image": digest, "seconds": 1000})
    assert (status, pin["ttl_seconds"]) == (200, 1000)
    for who, seconds, kept in (("a", 10, 1000), ("a", 2000, 2000), ("boss", 10, 10)):
        body = {"image": digest[7:19], "seconds": seconds}
        status, pin = await remote.call(who, "POST", "/v1/pins", body)
        assert (status, pin["ttl_seconds"]) == (200, kept)
    assert len(as_documented("/v1/pins", (await remote.call("a", "GET", "/v1/pins"))[1])["pins"])
    assert (await remote.call("b", "GET", "/v1/pins"))[1] == {"pins": []}
    assert (await remote.call("a", "DELETE", f"/v1/pins/{digest}"))[0] == 403
    assert (await remote.call("boss", "DELETE", f"/v1/pins/{digest}"))[0] == 204
    assert (await remote.call("boss", "DELETE", f"/v1/pins/{digest}"))[0] == 404


async def test_leases_profile_cache_and_store_are_told(remote: Remote, built: str) -> None:
    """As documented; the host's and the realm's totals to nobody who has an owner."""
    digest = await preloaded(remote, "a", built)
    assert (await remote.call("a", "POST", "/v1/exports", {"image": built}))[0] == 201
    leases: list[Any] = []
    async with asyncio.timeout(90):
        while not leases:  # the reader's lease follows the export in the background
            answer = (await remote.call("reader", "GET", "/v1/leases"))[1]
            leases = as_documented("/v1/leases", answer)["leases"]
    assert (leases[0]["purpose"], leases[0]["images"]) == ("read", [digest])
    assert (await remote.call("b", "GET", "/v1/leases"))[1] == {"leases": []}
    assert (await remote.call("reader", "POST", f"/v1/images/{digest}/profile"))[0] == 403
    assert (await remote.call("b", "POST", f"/v1/images/{digest}/profile"))[0] == 404
    status, made = await remote.call("a", "POST", f"/v1/images/{digest}/profile")
    assert (status, made["image"], made["own"]) == (200, digest, True)
    assert (await remote.call("a", "GET", f"/v1/images/{digest}/profile"))[1] == made
    for path, who in (
        ("/v1/cache", "reader"),
        ("/v1/store", "reader"),
        ("/v1/store/account", "boss"),
    ):
        status, answer = await remote.call(who, "GET", path)
        assert status == 200
        as_documented(path, answer)
        assert (await remote.call("a", "GET", path))[0] == 403
    text = (await remote.call("a", "GET", "/metrics"))[1]
    assert "cubecache_export_misses" in text
    assert "cubecache_nbd_hits" not in text
    assert "team-a." not in (await remote.call("b", "GET", "/metrics"))[1]


async def test_dropping_an_image_drops_its_names(remote: Remote, built: str) -> None:
    """Only an admin; the image stays by its digest until a collection."""
    digest = await preloaded(remote, "a", built)
    assert (await remote.call("a", "DELETE", f"/v1/images/{digest}"))[0] == 403
    status, answer = await remote.call("boss", "DELETE", f"/v1/images/{digest}")
    assert (status, answer["image"], len(answer["dropped"])) == (200, digest, 1)
    _, shown = await remote.call("boss", "GET", f"/v1/images/{digest}")
    assert shown["images"][0]["names"] == []
    assert (await remote.call("boss", "DELETE", f"/v1/images/{digest}"))[0] == 404
