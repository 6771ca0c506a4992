"""One epoll for all connections: who is called, who no longer, and what is left at the end."""

import asyncio
import socket
from contextlib import ExitStack

from kits.until import until

from nbdserver.readiness import Readiness


async def test_ended_by_a_neighbour():
    """Who is ended by another's callback in the same turn is not called."""
    readiness, called = Readiness(), []
    with ExitStack() as stack:
        pairs = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(2)]
        fds = [ours.fileno() for ours, _theirs in pairs]

        def call(number):
            called.append(number)
            for fd in fds:
                readiness.unwatch(fd)

        for number, fd in enumerate(fds):
            readiness.watch(fd, lambda number=number: call(number))
        for _ours, theirs in pairs:
            theirs.send(b"x")
        await until(lambda: called, "a callback")
        await asyncio.sleep(0)
        assert len(called) == 1


async def test_watched_again_and_nothing_left():
    """A descriptor comes and goes, as long as it is readable it is called, and the loop forgets."""
    readiness, called = Readiness(), []
    loop = asyncio.get_running_loop()
    before = len(loop._selector.get_map())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        for round_ in range(1, 4):
            readiness.watch(ours.fileno(), lambda: called.append(ours.fileno()))
            await until(lambda seen=len(called): len(called) > seen + round_, "calls")
            readiness.unwatch(ours.fileno())
            assert len(loop._selector.get_map()) == before
        count = len(called)
        await asyncio.sleep(0.01)
        assert len(called) == count
