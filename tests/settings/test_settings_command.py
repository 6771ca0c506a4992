"""`cubecache config` as a user runs it."""

import json
import os
import subprocess
from pathlib import Path

COMMAND = Path(__file__).parents[2] / ".venv/bin/cubecache"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CUBECACHE_")}
    return subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, env=kept | environment, check=False
    )


def test_show_tells_values_and_sources_and_check_refuses(tmp_path: Path) -> None:
    """J10: the same reading as the daemon's, before the daemon is started."""
    config = tmp_path / "c.toml"
    config.write_text('[cache]\nfill = "hot"\n')
    shown = run("--config", str(config), "config", "show", "--json", CUBECACHE_REALM="r")
    rows = {row["name"]: (row["value"], row["from"]) for row in json.loads(shown.stdout)}
    assert rows["cache.fill"] == ("hot", f"file {config}")
    assert rows["realm"] == ("r", "environment CUBECACHE_REALM")
    assert rows["nbd.tcp"] == (None, "default")
    checked = run("--config", str(config), "config", "check", CUBECACHE_CACHE_BUGDET="1")
    assert checked.returncode == 0
    assert "CUBECACHE_CACHE_BUGDET" in checked.stderr
    config.write_text("[cache]\nfil = 3\n")
    refused = run("--config", str(config), "config", "check", "--json")
    assert (refused.returncode, json.loads(refused.stdout)["error"]["kind"]) == (2, "UsageError")
    config.chmod(0o666)
    assert run("--config", str(config), "config", "check").returncode == 77
