"""Configuration of a running daemon, and its log lines."""

import asyncio
import dataclasses
import json
import logging
import os
import signal
from collections.abc import Iterator

import aiohttp
import pytest

from imagecache.daemon.logs import (
    LINES_PER_WINDOW,
    JsonFormatter,
    RateFilter,
    TextFormatter,
)
from imagecache.daemon.serve import serve
from imagecache.daemon.service import Service
from imagecache.errors import UsageError
from imagecache.logcontext import about
from imagecache.settings import Settings


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


async def test_hangup_reads_the_configuration_again(where: Settings, logs_as_before: None) -> None:
    """A good configuration is taken, a bad one leaves the daemon as it was."""
    answers: list[Settings | UsageError] = []

    def reread() -> Settings:
        answer = answers.pop()
        if isinstance(answer, UsageError):
            raise answer
        return answer

    opened: list[Service] = []
    task = asyncio.create_task(serve(where, opened.append, reread=reread))
    while not opened:
        await asyncio.sleep(0.01)
        assert not task.done(), task
    build = dataclasses.replace(where.build, level=7)
    cache = dataclasses.replace(where.cache, budget_bytes=1)
    for answer in (dataclasses.replace(where, build=build, cache=cache), UsageError("bad")):
        answers.append(answer)
        os.kill(os.getpid(), signal.SIGHUP)
        while answers:
            await asyncio.sleep(0.01)
        assert opened[0].settings.build.level == 7
        assert opened[0].settings.cache.budget_bytes == where.cache.budget_bytes
    os.kill(os.getpid(), signal.SIGTERM)
    await task


def record(message: str, **extra: str) -> logging.LogRecord:
    made = logging.LogRecord("imagecache.x", logging.INFO, "x.py", 1, message, None, None)
    made.__dict__.update(extra)
    return made


@pytest.mark.quick
def test_log_lines_are_one_line_each_and_keep_their_fields() -> None:
    """E27: what strangers named cannot forge a line or drive a terminal."""
    hostile = record("name \x1b[2J\nforged", request="r1", export="a\nb")
    text = TextFormatter().format(hostile)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "request=r1" in text
    line = JsonFormatter().format(hostile)
    assert "\n" not in line
    assert json.loads(line)["export"] == "a\nb"
    assert json.loads(line)["level"] == "info"


@pytest.mark.quick
async def test_lines_name_what_the_work_that_logs_them_is_about() -> None:
    """What a task starts inherits it; an inner name wins; afterwards a line names nothing."""

    async def below() -> str:
        with about(job="j", owner=""):
            return JsonFormatter().format(record("deep", export="other"))

    with about(request="r", export="e"):
        task = asyncio.create_task(below())
    line = json.loads(await task)
    assert (line["request"], line["export"], line["job"]) == ("r", "other", "j")
    assert "owner" not in line
    assert set(json.loads(JsonFormatter().format(record("x")))) == {
        "time",
        "level",
        "logger",
        "message",
    }


async def test_a_request_has_one_id_in_its_answer_its_problem_and_its_lines(
    daemon: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller's id where it gave a good one; the export of a path is on the line too."""
    formatted: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            formatted.append(TextFormatter().format(record))

    kept = Kept()
    logging.getLogger("imagecache.daemon").addHandler(kept)
    caplog.set_level(logging.INFO, "imagecache.daemon")
    try:
        connector = aiohttp.UnixConnector(path=str(daemon.control_socket))
        async with aiohttp.ClientSession(connector=connector) as session:
            for given in ("mine-1", "not one\t"):
                async with session.delete(
                    "http://x/v1/exports/absent", headers={"X-Request-Id": given}
                ) as answer:
                    problem = await answer.json(content_type=None)
                    identity = answer.headers["X-Request-Id"]
                assert answer.status == 404
                assert problem["request"] == identity
                assert (identity == given) is (given == "mine-1")
                assert any(
                    f"request={identity}" in line and "DELETE" in line for line in formatted
                ), formatted
    finally:
        logging.getLogger("imagecache.daemon").removeHandler(kept)


@pytest.mark.quick
def test_one_source_line_logs_so_often_per_window() -> None:
    now = [0.0]
    limit = RateFilter(lambda: now[0])
    assert sum(limit.filter(record("x")) for _ in range(1000)) == LINES_PER_WINDOW
    now[0] = 11.0
    last = record("x")
    assert limit.filter(last)
    assert f"{1000 - LINES_PER_WINDOW} like it" in last.getMessage()
