"""One client's flood is served in portions, so that its neighbours' requests come in between."""

import threading

import pytest
from kits.nbd_client import EINVAL, FLUSH, READ, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern

FLOOD = 3000


class WatchedDevice(MemoryDevice):
    """Notes how much was answered to anybody when the victim's block was read."""

    server = None
    before_victim = None

    def try_read(self, offset, length):
        if offset == 512 * 1024:
            counters = self.server.counters
            self.before_victim = counters.errors + counters.hits
        return super().try_read(offset, length)


@pytest.mark.parametrize("kind", ["errors", "reads"])
def test_flood_leaves_turns_to_others(tmp_path, kind):
    """F20: of a flood that was there first, most is answered after a neighbour's one read."""
    device = WatchedDevice()
    with ServerThread(tmp_path / "s", device) as running:
        device.server = running.server
        with RawClient(running.path) as flood, RawClient(running.path) as victim:
            flood.greet().go()
            victim.greet().go()
            command, offset, error = (FLUSH, 1, EINVAL) if kind == "errors" else (READ, 0, 0)
            asked = b"".join(flood.pack(command, offset, 1) for _ in range(FLOOD))
            frozen, both_sent = threading.Event(), threading.Event()
            running.loop.call_soon_threadsafe(lambda: (frozen.set(), both_sent.wait(20)))
            assert frozen.wait(20)
            flood.send(asked)
            victim.send(victim.pack(READ, 512 * 1024, 4096))
            both_sent.set()
            assert victim.reply().data == pattern(512 * 1024, 4096)
            assert device.before_victim < FLOOD / 2
            for _ in range(FLOOD):
                assert flood.reply().error == error
