"""Takes the status page's screenshots for the documentation, from a daemon that does real work.

    PYTHONPATH=tools .venv/bin/python tools/screenshots.py [FOLDER]

Writes page.png, page-phone.png and start.png into FOLDER (docs/). Real images are pushed to a
registry on loopback, stored, and one of them is started through a store that is 20 ms away.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagemaker.layout import push
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from testbed.browser import browser, resize, wait_for
from testbed.processes import Stage, free_port
from testbed.servers import (
    ROOT,
    start_object_store,
    start_proxy,
    start_registry,
    store_environment,
)

IMAGES = {
    "python-numpy": "acme/science:3.2",
    "nginx": "library/nginx:1.22",
    "redis": "library/redis:7.0",
}
LATE = ("openjdk", "acme/billing:2026.11")
PROGRAM = ["python3", "-c", "import numpy; print(numpy.__version__)"]
READER = ["sh", "-c", "for x in $(find /usr -type f); do cat $x; sleep 0.02; done"]
TOKEN = "screenshot"
CONFIG = "[cache]\nbudget_bytes = '2GiB'\nfill = 'hot'\n[registry]\nplain_http = ['{registry}']\n"


def main() -> int:
    """Makes the pictures; 1 where something failed."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Stage() as stage:
        folder = Path(scratch)
        registry = start_registry(stage).address
        for recipe, name in (*IMAGES.items(), LATE):
            push(make(RECIPES[recipe], ROOT / ".cache/images"), TAG, f"{registry}/{name}")
        config = folder / "cubecache.toml"
        config.write_text(CONFIG.format(registry=registry))
        store = start_object_store(stage)
        builder = [str(ROOT / ".venv/bin/cubecache"), "--config", str(config)]
        environment = os.environ | store_environment()
        names = [f"{registry}/{name}" for name in IMAGES.values()]
        away = ["--state-dir", str(folder / "builder"), "--store", store.url()]
        subprocess.run([*builder, *away, "preload", *names], check=True, env=environment)
        proxy = start_proxy(stage, store.endpoint, first_byte_ms=20)
        here = ["--state-dir", str(folder / "host"), "--store", store.url(proxy.endpoint)]
        port = free_port()
        tokens = folder / "tokens.toml"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        tokens.write_text(f'[tokens.page]\nrole = "read"\nsha256 = "{digest}"\n')
        environment |= {
            "CUBECACHE_API_TCP": f"127.0.0.1:{port}",
            "CUBECACHE_API_TOKENS": str(tokens),
        }
        daemon = stage.start([*builder, *here, "serve"], environment)
        daemon.wait_until((folder / "host/control.sock").exists, 60)

        def run(*arguments: str) -> None:
            subprocess.run([*builder, *here, *arguments], check=True, env=environment)

        run("preload", names[0])
        for name in names[1:]:
            run("export", name)
        mounted = folder / "mounted"
        mounted.mkdir()
        run("mount", names[0], str(mounted))
        try:
            subprocess.run(["chroot", str(mounted), *PROGRAM], check=True)
            busy = subprocess.Popen(["chroot", str(mounted), *READER], stdout=subprocess.DEVNULL)
            try:
                late = lambda: run("preload", "--detach", f"{registry}/{LATE[1]}")  # noqa: E731
                pictures(f"http://127.0.0.1:{port}/#token={TOKEN}", late, folder, target)
            finally:
                busy.kill()
                busy.wait()
        finally:
            run("umount", str(mounted))
        daemon.stop(30)
    return 0


def pictures(url: str, late: Callable[[], None], folder: Path, target: Path) -> None:
    """The page at two widths, and a start; `late` begins the preload that is seen running."""
    with browser(folder) as driver:
        resize(driver, (1180, 900))
        driver.get(url)
        wait_for(driver, "document.querySelectorAll('#images tbody tr').length >= 3")
        points = "document.querySelector('.tile path').getAttribute('d').split('L').length"
        wait_for(driver, f"{points} > 15")
        late()
        wait_for(driver, "document.querySelector('.state.now')")
        time.sleep(3)  # into its first layer
        shoot(driver, (1180, 0), target / "page.png")
        shoot(driver, (390, 844), target / "page-phone.png")
        resize(driver, (1180, 900))
        driver.execute_script(
            "[...document.querySelectorAll('#exports tr')]"
            ".find((x) => x.textContent.includes('science')).querySelector('button').click()"
        )
        wait_for(driver, "document.querySelector('#start svg[aria-label=map]')")
        driver.execute_script(
            "document.querySelectorAll('#start .bar, #start h2:nth-of-type(n+4), #start table')"
            ".forEach((x) => x.remove())"
        )
        shoot(driver, (1180, 0), target / "start.png", "#start")


def shoot(driver: Any, size: tuple[int, int], path: Path, only: str = "body") -> None:
    """One picture; height 0: as high as the page, at most 1500."""
    width, height = size
    resize(driver, (width, height or 900))
    if not height:
        script = "return Math.ceil(document.documentElement.scrollHeight)"
        height = int(driver.execute_script(script))
        resize(driver, (width, height))
    time.sleep(0.5)
    if only == "body":
        driver.save_screenshot(str(path))
    else:
        driver.find_element("css selector", only).screenshot(str(path))


if __name__ == "__main__":
    sys.exit(main())
