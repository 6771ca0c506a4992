"""Headless Chromium, driven by selenium: Debian's chromium and chromedriver, nothing downloaded."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--no-proxy-server",
)
DESKTOP, PHONE = (1180, 900), (390, 844)
SECONDS = 90.0


@contextmanager
def browser(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a fresh profile in `folder`; it is ended on leaving."""
    options = Options()
    options.binary_location = program("chromium", "google-chrome", "chrome")
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(program("chromedriver"), log_output=str(folder / "chromedriver.log"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


def program(*names: str) -> str:
    """The first of these programs that is here; selenium would download one."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"none of {', '.join(names)} is in the PATH; ./tools/setup on Debian")


def resize(driver: webdriver.Chrome, size: tuple[int, int]) -> None:
    """Makes the page exactly so wide, also below the least width of a window."""
    width, height = size
    facts = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", facts)


def wait_for(driver: webdriver.Chrome, script: str, seconds: float = SECONDS) -> object:
    """The first true value of a JavaScript expression."""
    return until(lambda: driver.execute_script(f"return {script}"), script, seconds)


def until(look: Callable[[], object], what: str, seconds: float = SECONDS) -> object:
    """What `look` answers once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = look()
        except WebDriverException:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, f"not in {seconds} seconds: {what}"
        time.sleep(0.1)


def complaints(driver: webdriver.Chrome) -> list[str]:
    """What the console says of level warning and above: refused styles, errors of the program."""
    return [
        entry["message"]
        for entry in driver.get_log("browser")  # type: ignore[no-untyped-call]  # selenium's
        if entry["level"] in ("WARNING", "SEVERE")
    ]
