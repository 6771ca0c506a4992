"""Frames of the channel between host and guest agent, as a protocol machine without I/O.

Format: PROTOCOL.md, "Frames". The guest's half is agent/channel.c. The guest is not trusted: every
length is bounded before a byte of payload is kept.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from imagecache.errors import Rejected

PROTOCOL_VERSION: Final = 2
HEADER: Final = struct.Struct("<IHHI")  # payload length, type, stream, process
PAYLOAD_LIMIT: Final = 65536
OUTPUT_WINDOW: Final = 256 * 1024  # bytes a guest stream may send before the first grant
INPUT_WINDOW: Final = 64 * 1024


class FrameType(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    EVENT = 2
    DATA = 3
    END = 4
    WINDOW = 5
    EXIT = 6
    LOG = 7
    FAILED = 8
    SIGNAL = 9
    SHUTDOWN = 10
    START = 11
    EXEC = 12
    RESIZE = 13
    CONNECT = 14
    STATS = 15
    LOST = 16
    PING = 17


class Stream(enum.IntEnum):
    """The streams of a process."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


class Key(enum.IntEnum):
    """Field keys of the records in control frames."""

    VERSION = 1
    NAME = 2
    AT = 3
    SENT = 4
    TEXT = 5
    CODE = 6
    SIGNAL = 7
    READ_BYTES = 8
    REALTIME = 9
    CONTAINER = 10
    ARGUMENT = 11
    VARIABLE = 12
    USER = 13
    DIRECTORY = 14
    TTY = 15
    STDIN = 16
    ROWS = 17
    COLUMNS = 18
    PORT = 19
    ADDRESS = 20
    USAGE = 21  # a container's record in STATS
    CPU_NS = 22
    MEMORY_BYTES = 23
    MEMORY_LIMIT = 24
    PIDS = 25
    WRITE_BYTES = 26
    MEMORY_TOTAL = 27
    MEMORY_FREE = 28
    RECEIVED_BYTES = 29
    SENT_BYTES = 30
    OOM_KILLS = 31


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `type` may be a number this version does not know, which receivers ignore."""

    type: int
    stream: int
    process: int
    payload: bytes


def encode(kind: FrameType, *, stream: int = 0, process: int = 0, payload: bytes = b"") -> bytes:
    """A frame's bytes; payloads over PAYLOAD_LIMIT are the caller's mistake."""
    if len(payload) > PAYLOAD_LIMIT:
        raise ValueError(f"frame payload of {len(payload)} bytes")
    return HEADER.pack(len(payload), kind, stream, process) + payload


class Decoder:
    """Turns received bytes, cut anywhere, into frames."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, received: bytes) -> list[Frame]:
        """Frames completed by these bytes; raises Rejected for a length over the limit."""
        self._pending += received
        complete: list[Frame] = []
        at = 0
        while len(self._pending) - at >= HEADER.size:
            length, kind, stream, process = HEADER.unpack_from(self._pending, at)
            if length > PAYLOAD_LIMIT:
                raise Rejected(f"the guest sent a frame of {length} bytes")
            end = at + HEADER.size + length
            if end > len(self._pending):
                break
            payload = bytes(memoryview(self._pending)[at + HEADER.size : end])
            complete.append(Frame(kind, stream, process, payload))
            at = end
        del self._pending[:at]
        return complete
