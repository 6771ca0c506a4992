"""When writes leave the event loop: for a slow disk, and not for a busy processor."""

import pytest

from nbdserver import writepace
from nbdserver.filedevice import FileDevice
from nbdserver.writepace import QUICK_WRITE, WritePace


class Clock:
    """A clock, and how often its thread slept; `write` takes `seconds` of which it `sleeps`."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 100.0, 0
        monkeypatch.setattr(writepace, "monotonic", lambda: self.now)
        monkeypatch.setattr(writepace, "_times_slept", lambda: self.slept)

    def write(self, pace, seconds, sleeps):
        assert pace.begin(4096)
        self.now += seconds
        self.slept += sleeps
        pace.end()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.quick
def test_slow_disk(clock):
    """The second write that slept for long sends writes to threads, for a while."""
    pace = WritePace()
    clock.write(pace, 0.2, sleeps=1)
    assert not pace.slow
    clock.write(pace, 0.2, sleeps=1)
    assert pace.slow and not pace.begin(4096)
    clock.now += 1.0
    assert not pace.slow and pace.begin(4096)


@pytest.mark.quick
def test_busy_processor(clock):
    """Who was only pushed off the processor goes on writing on the loop."""
    pace = WritePace()
    for _ in range(10):
        clock.write(pace, 0.2, sleeps=0)
    assert not pace.slow


@pytest.mark.quick
def test_long_writes(clock):
    """A large write is never done on the loop, however quick the disk."""
    assert not WritePace().begin(QUICK_WRITE + 1)


async def test_file_system_without_such_writes(tmp_path):
    """Where the file system has no NOWAIT writes, whole pages are taken on the loop, no parts."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    device = FileDevice(path, read_only=False)
    device._write_flags = 0
    assert not device.try_write(100, b"part of a page")
    assert device.try_write(8192, b"x" * 8192)
    assert path.read_bytes()[8192:16384] == b"x" * 8192
    await device.close()
