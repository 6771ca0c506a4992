"""`--json` is a contract: keys may be added, never renamed or removed; an error is one object."""

import asyncio
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
from click.testing import CliRunner

from imagecache.cli import root
from imagecache.settings import Settings

# Command (IMAGE and EXPORT stand for what the test made), and the keys that scripts rely on.
CONTRACT: tuple[tuple[str, str], ...] = (
    ("preload IMAGE", "name image block_image size_bytes chunks new_chunks stored_bytes layers"),
    ("preload --dry-run IMAGE", "image digest present layers missing_layers download_bytes"),
    ("images", "names image block_image fs platform size_bytes packed_bytes chunks layers"),
    ("export IMAGE", "name uri socket image block_image fs size_bytes clients state config"),
    ("exports", "name uri reference image fs size_bytes clients state failure fill start"),
    ("jobs", "id image state priority submitted attempts version progress result error"),
    ("inspect IMAGE", "image block_image fs size_bytes layers"),
    ("diff IMAGE IMAGE", ""),
    ("stats", "images logical_bytes unique_bytes stored_bytes dedup objects packs"),
    ("verify IMAGE", ""),
    ("pin IMAGE --ttl 1h", "image pinned ttl_seconds"),
    ("pin --list", "image name seconds_left"),
    ("gc --dry-run", "dry_run objects stored_bytes live_images doomed doomed_bytes deleted"),
    ("explain EXPORT", "version export reference begun seconds reads stalls ahead map"),
    ("config show", ""),
    ("doctor", ""),
    ("unexport EXPORT", ""),
    ("rm IMAGE", "dropped image would_free_bytes"),
)


def called(settings: Settings) -> Callable[[str], tuple[int, list[Any]]]:
    for entry in entry_points(group="cubecache.commands"):
        entry.load()(root)
    options = ["--state-dir", str(settings.state_dir), "--store", settings.store_url]

    def call(words: str) -> tuple[int, list[Any]]:
        # A thread: the daemon is this process's event loop.
        outcome = CliRunner().invoke(root, [*options, *words.split(), "--json"])
        code = outcome.return_value if isinstance(outcome.return_value, int) else outcome.exit_code
        if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        return code, [json.loads(line) for line in outcome.stdout.splitlines() if line]

    return call


async def test_answers_have_the_keys_that_scripts_rely_on(daemon: Settings, image: str) -> None:
    """K: every command's answer is JSON lines on stdout and nothing else."""
    call = called(daemon)
    export = ""
    for words, keys in CONTRACT:
        words = words.replace("IMAGE", image).replace("EXPORT", export)
        async with asyncio.timeout(90):
            code, answers = await asyncio.to_thread(call, words)
        assert code in (0, None) or words == "doctor", (words, code)
        assert answers, words
        answer = answers[0][0] if isinstance(answers[0], list) else answers[0]
        missing = set(keys.split()) - set(answer)
        assert not missing, (words, missing, sorted(answer))
        if words.startswith("export "):
            export = answer["name"]


@pytest.mark.parametrize("words", ["export absent.example/x", "images --no-such"])
def test_an_error_is_one_object_too(where: Settings, words: str, tmp_path: Any) -> None:
    """K: message, kind, remedy and the exit code; nothing else on stdout."""
    from kits.journey import Cubecache
    from testbed.processes import Stage

    with Stage() as stage:
        answer = Cubecache(stage, where.state_dir).run(*words.split(), "--json", expect=None)
    (told,) = answer.lines()
    assert set(told["error"]) >= {"kind", "message", "remedy", "exit_code"}
    assert told["error"]["exit_code"] == answer.code
