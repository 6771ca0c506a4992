"""The daemon as a service: units, readiness, a start without registry and store."""

import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from imagecache.composition import ImageRequest
from imagecache.daemon.notify import notify
from imagecache.daemon.serve import serve
from imagecache.daemon.service import ExportRequest, Service
from imagecache.settings import Settings

UNITS = Path(__file__).parents[2] / "packaging/systemd"


def test_units_verify_clean(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say."""
    unit = tmp_path / "cubecache.service"
    text = (UNITS / "cubecache.service").read_text()
    # What is not installed on the machine of this test has a stand-in.
    text = text.replace("/usr/bin/cubecache serve", "/bin/true").replace("cubecache\n", "root\n")
    unit.write_text(text.replace("Directory=root", "Directory=cubecache"))
    sockets = tmp_path / "cubecache.socket"
    sockets.write_text((UNITS / "cubecache.socket").read_text().replace("=cubecache\n", "=root\n"))
    outcome = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit, sockets],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (outcome.returncode, outcome.stdout + outcome.stderr) == (0, "")


@pytest.mark.quick
def test_notify_reaches_paths_and_abstract_names(tmp_path: Path) -> None:
    for address in (str(tmp_path / "n"), f"@cubecache-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0", 1))
            assert notify("READY=1", {"NOTIFY_SOCKET": address})
            assert manager.recv(100) == b"READY=1"
    assert not notify("READY=1", {})
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


async def test_ready_is_told_once_sockets_answer_and_stopping_before_they_close(
    where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        tempfile.TemporaryDirectory() as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(short + "/n")
        manager.setblocking(False)
        monkeypatch.setitem(os.environ, "NOTIFY_SOCKET", short + "/n")
        task = asyncio.create_task(serve(where, lambda _: None))
        loop = asyncio.get_running_loop()
        told = [await loop.sock_recv(manager, 200)]
        while not told[-1].startswith(b"READY=1\n"):
            told.append(await loop.sock_recv(manager, 200))
        assert {line.partition(b"\n")[0] for line in told[:-1]} == {b"FDSTORE=1"}
        _, writer = await asyncio.open_unix_connection(str(where.control_socket))
        writer.close()
        await writer.wait_closed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await loop.sock_recv(manager, 200) == b"STOPPING=1"
        await task


async def test_starts_with_registry_and_store_down(
    where: Settings, built: str, tmp_path: Path
) -> None:
    """Exports are restored before any network: an S3 store that nobody answers for, no registry."""
    service = await Service.open(where)
    name = (
        await service.export(ExportRequest(ImageRequest.parse(built, None, "erofs")))
    ).record.name
    await service.close()
    shutil.rmtree(where.store_url.removeprefix("file://"))
    monkey = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    before = {key: os.environ.get(key) for key in monkey}
    os.environ.update(monkey)
    try:
        dead = dataclasses.replace(where, store_url="s3://b/p?endpoint=http://127.0.0.1:9&region=x")
        again = await Service.open(dead)
        try:
            assert again.ready
            assert [export.record.name for export in again.exports()] == [name]
            assert again.exports()[0].failure is None
        finally:
            await again.close()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
