"""The status page in a real browser: what it shows, to whom, and that nothing else is loaded."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kits.httpapi import Remote, free_port, preloaded, served, write_tokens
from testbed.browser import DESKTOP, PHONE, browser, complaints, resize, wait_for

from imagecache.daemon.page import asset
from imagecache.settings import ApiSection, Settings

OVERFLOWING = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
async def page(where: Settings, tmp_path: Path, built: str) -> AsyncIterator[str]:
    """A daemon with an export of each of two owners; the page's address."""
    port = free_port()
    tokens = write_tokens(tmp_path / "tokens.toml")
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens), private_images=True)
    url = f"http://127.0.0.1:{port}"
    async with served(where, api), aiohttp.ClientSession() as session:
        remote = Remote(session, url)
        for who in ("a", "b"):
            await preloaded(remote, who, built)
            status, _ = await remote.call(who, "POST", "/v1/exports", {"image": built})
            assert status == 201
        yield url


def look(url: str, folder: Path) -> dict[str, Any]:
    """All that one browser session finds out; it runs in a thread."""
    found: dict[str, Any] = {}
    with browser(folder) as driver:
        resize(driver, DESKTOP)
        driver.get(url + "/")
        wait_for(driver, "!document.getElementById('door').hidden")
        assert driver.execute_script("return document.getElementById('all').hidden")
        driver.execute_script(
            "document.getElementById('token').value = 'wrong';"
            "document.querySelector('#door button').click()"
        )
        wait_for(driver, "document.getElementById('refused').textContent")
        complaints(driver)  # the browser notes each 401
        driver.execute_script(
            f"document.getElementById('token').value = '{'reader' * 9}';"
            "document.querySelector('#door button').click()"
        )
        wait_for(driver, "document.querySelectorAll('#exports tbody tr').length === 2")
        wait_for(driver, "document.querySelector('#images .main')")
        wait_for(driver, "document.querySelector('#tiers .main')")
        wait_for(driver, "document.getElementById('live').textContent === 'live'")
        found["text"] = driver.find_element("tag name", "main").text
        driver.execute_script("document.querySelector('#exports button').click()")
        wait_for(driver, "document.querySelector('#start svg[aria-label=map]')")
        found["start"] = driver.find_element("id", "start").text
        for name, size in (("desktop", DESKTOP), ("phone", PHONE)):
            resize(driver, size)
            found[name] = driver.execute_script(f"return {OVERFLOWING}")
            driver.save_screenshot(str(folder / f"{name}.png"))
        found["complaints"] = complaints(driver)
        requests = [
            json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
        ]
        found["urls"] = {
            x["params"]["request"]["url"]
            for x in requests
            if x["method"] == "Network.requestWillBeSent"
            and x["params"]["request"]["url"].startswith(("http", "ws"))
        }
        driver.execute_script("sessionStorage.clear()")
        driver.get(url + "/#token=" + "b" * 9)
        driver.refresh()
        wait_for(driver, "document.querySelectorAll('#exports tbody tr').length === 1")
        found["address"] = driver.current_url
        found["owner"] = driver.find_element("tag name", "main").text
        found["numbers"] = driver.execute_script("return document.getElementById('cache').hidden")
    return found


async def test_page_shows_what_a_token_may_see_at_every_width(page: str, tmp_path: Path) -> None:
    """I10, I11: no token, no data; an owner sees its own; nothing comes from outside."""
    found = await asyncio.wait_for(asyncio.to_thread(look, page, tmp_path), 300)
    assert "team-a." in found["text"] and "team-b." in found["text"]
    assert "done" in found["text"] and "erofs" in found["text"]
    assert "Map of the disk" in found["start"]
    assert (found["desktop"], found["phone"]) == (0, 0), "wider than the window"
    assert found["complaints"] == []
    assert {url.partition("://")[2].partition("/")[0] for url in found["urls"]} == {
        page.partition("://")[2]
    }
    assert "team-b." in found["owner"] and "team-a." not in found["owner"]
    assert found["numbers"] is True, "the host's totals are of all owners"
    assert "token" not in found["address"]


@pytest.mark.quick
def test_page_has_nothing_inline_and_nothing_from_outside() -> None:
    page, style, script = asset("index.html"), asset("page.css"), asset("page.js")
    assert "style=" not in page and "onclick" not in page and "<script>" not in page
    for text in (page, style, script):
        assert "https://" not in text
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text and "eval(" not in text
