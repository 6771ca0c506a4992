"""The host's end of the channel against guests that say anything: bounded, typed, never stuck."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cube.channel.messages import (
    ContainerStats,
    ExecSpec,
    decode_stats,
    encode_connect,
    encode_exec,
    encode_size,
)
from cube.frames import (
    HEADER,
    INPUT_WINDOW,
    OUTPUT_WINDOW,
    PAYLOAD_LIMIT,
    PROTOCOL_VERSION,
    Decoder,
    FrameType,
    Key,
    encode,
)
from cube.link import OWN_PROCESSES, GuestLink
from cube.records import field, fields, number, text
from imagecache.errors import LimitExceeded, Rejected, Unavailable, UsageError

pytestmark = pytest.mark.quick
SECONDS = 60.0
HELLO = encode(FrameType.HELLO, payload=number(Key.VERSION, PROTOCOL_VERSION))


class Guest:
    """The far end of a link's socket, driven by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.decoder = Decoder()
        self.frames = []

    def say(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def hear(self, kind: FrameType):
        """The next frame of this type; others before it are dropped."""
        async with asyncio.timeout(SECONDS):
            while True:
                while self.frames:
                    frame = self.frames.pop(0)
                    if frame.type == kind:
                        return frame
                received = await self.reader.read(65536)
                assert received, "the link closed"
                self.frames += self.decoder.feed(received)


@contextlib.asynccontextmanager
async def linked(sync_key: bytes = b""):
    near, far = socket.socketpair()
    link = GuestLink(*await asyncio.open_unix_connection(sock=near), sync_key=sync_key)
    guest = Guest(*await asyncio.open_unix_connection(sock=far))
    serving = asyncio.create_task(link.serve())
    try:
        yield link, guest, serving
    finally:
        guest.writer.close()
        with contextlib.suppress(Rejected):
            await asyncio.wait_for(serving, SECONDS)
        link._writer.close()


def event(name: str, process: int) -> bytes:
    return encode(FrameType.EVENT, process=process, payload=text(Key.NAME, name))


def end(process: int, code: int = 0, problem: str = "") -> bytes:
    payload = number(Key.CODE, code) + text(Key.TEXT, problem)
    return encode(FrameType.EXIT, process=process, payload=payload)


async def test_requests_reach_the_guest_and_answers_come_back():
    async with linked() as (link, guest, _):
        guest.say(HELLO)
        await asyncio.wait_for(link.greeted, SECONDS)
        process = link.execute(ExecSpec(3, ("a", "b"), ("X=1",), "u", "/w", tty=True, rows=9))
        request = await guest.hear(FrameType.EXEC)
        keys = [(Key(key), value) for key, value in fields(request.payload)]
        assert request.process == process.id >= 0x10000
        assert [value for key, value in keys if key == Key.ARGUMENT] == [b"a", b"b"]
        assert dict(keys)[Key.CONTAINER][0] == 3
        guest.say(
            event("exec", process.id),
            encode(FrameType.DATA, stream=1, process=process.id, payload=b"out"),
            encode(FrameType.LOST, stream=1, process=process.id, payload=struct.pack("<Q", 7)),
            end(process.id, 4),
        )
        assert await process.stdout.read() == b"out"
        assert (await process.wait(seconds=SECONDS)).code == 4
        assert await process.stdout.read() == b""
        assert process.stdout.lost == 7
        link.forget(process)
        peer = link.connect(80)
        assert peer.id != process.id
        guest.say(end(peer.id, 111, "refused\x1b[2J"))
        outcome = await peer.wait(seconds=SECONDS)
        assert (outcome.code, outcome.problem) == (111, "refused\\x1b[2J")


async def test_questions_are_answered_or_unavailable():
    async with linked() as (link, guest, serving):
        asking = asyncio.create_task(link.stats(seconds=SECONDS))
        await guest.hear(FrameType.STATS)
        usage = field(Key.USAGE, number(Key.CONTAINER, 1) + number(Key.CPU_NS, 5))
        guest.say(encode(FrameType.STATS, payload=usage + number(Key.MEMORY_TOTAL, 9)))
        stats = await asking
        assert stats.containers == {1: ContainerStats(cpu_ns=5)}
        assert stats.memory_total == 9
        ping = asyncio.create_task(link.ping(seconds=SECONDS))
        frame = await guest.hear(FrameType.PING)
        guest.say(
            encode(FrameType.PING, payload=b"other"), encode(FrameType.PING, payload=frame.payload)
        )
        await ping
        with pytest.raises(Unavailable, match="did not answer"):
            await link.ping(seconds=0.01)
        waiting = [asyncio.create_task(link.stats(seconds=SECONDS)) for _ in range(16)]
        await guest.hear(FrameType.STATS)
        with pytest.raises(Unavailable, match="earlier questions"):
            await link.stats()
        process = link.start(1)
        guest.writer.close()
        for task in waiting:
            with pytest.raises(Unavailable, match="closed"):
                await task
        with pytest.raises(Unavailable, match="channel closed"):
            await process.wait(seconds=SECONDS)
        await asyncio.wait_for(serving, SECONDS)
        with pytest.raises(Unavailable, match="closed"):
            await link.ping()


async def test_adoption_finds_its_place_in_a_stale_conversation():
    key = bytes(range(16))
    async with linked(key) as (link, guest, _):
        greeting = await asyncio.wait_for(guest.reader.readexactly(48), SECONDS)
        assert greeting[:16] == key
        stale = encode(FrameType.DATA, stream=1, process=9, payload=b"x" * 50)[:-20]
        for piece in (stale, greeting[16:30], greeting[16:20], greeting[20:] + HELLO):
            guest.say(piece)
            await asyncio.sleep(0)
        guest.say(event("known", 1), event("exec", 1), event("known", 2), end(2, 3))
        guest.say(event("known", 0x20000), event("adopted", 0))
        await asyncio.wait_for(link.greeted, SECONDS)
        assert set(link.states) == set(link.processes) == {1, 2}
        assert link.states[1].started.is_set()
        assert link.states[2].exited.result().code == 3
        guest.say(event("known", 7))
        await asyncio.sleep(0.01)
        assert 7 not in link.processes


async def test_guest_that_names_endless_containers_loses_its_channel():
    async with linked(bytes(range(16))) as (_, guest, serving):
        greeting = await asyncio.wait_for(guest.reader.readexactly(48), SECONDS)
        guest.say(greeting[16:], HELLO, *(event("known", number_) for number_ in range(1, 40)))
        with pytest.raises(Rejected, match="more containers"):
            await asyncio.wait_for(serving, SECONDS)


async def test_more_output_than_granted_ends_the_channel():
    async with linked() as (link, guest, serving):
        process = link.start(1)
        piece = encode(FrameType.DATA, stream=1, process=1, payload=bytes(PAYLOAD_LIMIT))
        guest.say(*[piece] * (OUTPUT_WINDOW // PAYLOAD_LIMIT))
        guest.say(encode(FrameType.DATA, stream=1, process=1, payload=b"x"))
        with pytest.raises(Rejected, match="more output"):
            await asyncio.wait_for(serving, SECONDS)
        kept = 0
        while piece := await process.stdout.read():
            kept += len(piece)
        assert kept == OUTPUT_WINDOW


async def test_tiny_frames_are_joined_and_their_grants_gathered():
    async with linked() as (link, guest, _):
        process = link.start(1)
        guest.say(*[encode(FrameType.DATA, stream=1, process=1, payload=b"x")] * 20000)
        guest.say(encode(FrameType.PING))
        async with asyncio.timeout(SECONDS):
            while sum(map(len, process.stdout._kept)) < 20000:
                await asyncio.sleep(0)
        assert len(process.stdout._kept) <= 4097
        seen = 0
        while seen < 20000:
            seen += len(await process.stdout.read())
        granted = await guest.hear(FrameType.WINDOW)
        assert struct.unpack("<I", granted.payload) == (20000,)


async def test_guest_that_reads_nothing_loses_its_channel():
    async with linked() as (link, _, serving):
        process = link.start(1)
        for _ in range(2000):
            process.resize(1, 1)
            link.send(FrameType.LOG, payload=bytes(PAYLOAD_LIMIT))
        await asyncio.wait_for(serving, SECONDS)
        assert link._writer.transport.get_write_buffer_size() == 0


async def test_input_keeps_to_its_window_and_wakes_at_the_end():
    async with linked() as (link, guest, _):
        process = link.start(1)
        writing = asyncio.create_task(process.write_input(bytes(3 * INPUT_WINDOW)))
        guest.say(event("exec", 1))
        seen = 0
        while seen < INPUT_WINDOW:
            seen += len((await guest.hear(FrameType.DATA)).payload)
        assert seen == INPUT_WINDOW
        # A grant of everything at once is still one window.
        guest.say(encode(FrameType.WINDOW, process=1, payload=b"\xff\xff\xff\xff"))
        while seen < 2 * INPUT_WINDOW:
            seen += len((await guest.hear(FrameType.DATA)).payload)
        assert not writing.done()
        guest.say(end(1))
        await asyncio.wait_for(writing, SECONDS)


async def test_container_that_runs_is_not_started_again():
    async with linked() as (link, guest, _):
        process = link.start(1)
        guest.say(event("exec", 1))
        await asyncio.wait_for(process.started.wait(), SECONDS)
        with pytest.raises(UsageError, match="runs already"):
            link.start(1)
        guest.say(end(1))
        await process.wait(seconds=SECONDS)
        assert link.start(1) is not process


async def test_own_processes_are_limited():
    async with linked() as (link, _, _):
        running = [link.connect(80) for _ in range(OWN_PROCESSES)]
        with pytest.raises(LimitExceeded, match="64 execs"):
            link.execute(ExecSpec(1, ("x",)))
        link.forget(running[0])
        assert link.connect(80).id not in {process.id for process in running}


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (ExecSpec(1, ()), UsageError),
        (ExecSpec(1, ("",)), UsageError),
        (ExecSpec(1, ("a\0b",)), UsageError),
        (ExecSpec(1, ("a",), ("novalue",)), UsageError),
        (ExecSpec(1, ("a",), ("=x",)), UsageError),
        (ExecSpec(1, ("a",) * 4097), LimitExceeded),
        (ExecSpec(1, ("a" * 70000,)), LimitExceeded),
    ],
)
def test_execs_that_no_guest_could_run_are_refused(spec, error):
    with pytest.raises(error):
        encode_exec(spec)


def test_connections_and_sizes_have_bounds():
    for port in (0, -1, 65536):
        with pytest.raises(UsageError, match="port"):
            encode_connect(port)
    with pytest.raises(UsageError, match="IP address"):
        encode_connect(1, "x" * 65)
    assert encode_size(0, 1 << 40) == number(Key.ROWS, 1) + number(Key.COLUMNS, 65535)


@given(st.binary(max_size=300))
def test_stats_of_any_bytes_are_rejected_or_bounded(raw):
    with contextlib.suppress(Rejected):
        assert len(decode_stats(raw).containers) <= 32


RECORD = st.lists(
    st.builds(
        lambda key, value, lie: struct.pack("<HHI", key, 0, max(0, len(value) + lie)) + value,
        st.integers(0, 32),
        st.binary(max_size=12) | st.sampled_from([b"known", b"exec", b"adopted"]),
        st.sampled_from([0, 0, 0, 0, 1, -1]),
    ),
    max_size=4,
).map(b"".join)
FRAME = st.builds(
    lambda kind, stream, process, payload, lie: (
        HEADER.pack(max(0, len(payload) + lie), kind, stream, process) + payload
    ),
    st.integers(0, 20),
    st.integers(0, 4),
    st.sampled_from([0, 1, 2, 0x10000, 0x10001, 0xFFFFFFFF]),
    RECORD | st.binary(max_size=40),
    st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 1 << 20]),
)


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(FRAME, max_size=30), raw=st.binary(max_size=60))
def test_whatever_a_guest_says_ends_in_rejection_or_nothing(frames, raw):
    async def talk() -> None:
        async with linked() as (link, guest, serving):
            link.start(1)
            link.execute(ExecSpec(1, ("x",)))
            asking = asyncio.create_task(link.stats(seconds=SECONDS))
            await asyncio.sleep(0)
            guest.say(HELLO, *frames, raw)
            guest.writer.write_eof()
            await asyncio.wait({serving}, timeout=SECONDS)
            assert serving.done()
            assert serving.exception() is None or isinstance(serving.exception(), Rejected)
            with contextlib.suppress(Unavailable):
                await asking
            assert len(link.processes) <= 2
            for process in link.processes.values():
                with contextlib.suppress(Unavailable):
                    await process.wait(seconds=SECONDS)

    asyncio.run(talk())
