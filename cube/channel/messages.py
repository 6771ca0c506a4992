"""Requests to the guest's agent and its answers. Pure. Format: PROTOCOL.md, "Channel"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cube.frames import PAYLOAD_LIMIT, Key
from cube.records import fields, number, numbers, text
from imagecache.errors import LimitExceeded, UsageError

ARGUMENT_LIMIT: Final = 4096  # arguments, or variables, of one exec
STATS_CONTAINERS: Final = 32
LOCALHOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """A program to run in a running container; empty user and directory are the container's.

    An `arguments` that starts with "cube:busybox" runs the agent's own busybox there.
    """

    container: int
    arguments: Sequence[str]
    environment: Sequence[str] = ()  # NAME=VALUE, added to the container's
    user: str = ""
    working_directory: str = ""
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    cols: int = 80


@dataclass(frozen=True, slots=True)
class ContainerStats:
    """What a container used since its machine started; `memory_bytes` is its working set."""

    cpu_ns: int = 0
    memory_bytes: int = 0
    memory_limit: int = 0  # 0 = none
    pids: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    oom_kills: int = 0


@dataclass(frozen=True, slots=True)
class GuestStats:
    """What a machine uses, and its containers by id."""

    containers: dict[int, ContainerStats] = field(default_factory=dict)
    memory_total: int = 0
    memory_free: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    cpu_ns: int = 0


def encode_exec(spec: ExecSpec) -> bytes:
    """The request's record; raises UsageError or LimitExceeded for what cannot be asked."""
    words = (*spec.arguments, *spec.environment, spec.user, spec.working_directory)
    if not spec.arguments or not spec.arguments[0]:
        raise UsageError("exec names no command")
    if any("\0" in word for word in words):
        raise UsageError("a word of the exec holds a NUL byte")
    if any(variable.find("=") < 1 for variable in spec.environment):
        raise UsageError("an environment variable is not NAME=VALUE")
    if max(len(spec.arguments), len(spec.environment)) > ARGUMENT_LIMIT:
        raise LimitExceeded(f"exec takes at most {ARGUMENT_LIMIT} arguments and variables")
    payload = number(Key.CONTAINER, spec.container)
    payload += b"".join(text(Key.ARGUMENT, word) for word in spec.arguments)
    payload += b"".join(text(Key.VARIABLE, word) for word in spec.environment)
    payload += text(Key.USER, spec.user) + text(Key.DIRECTORY, spec.working_directory)
    payload += number(Key.TTY, int(spec.tty)) + number(Key.STDIN, int(spec.stdin))
    payload += encode_size(spec.rows, spec.cols)
    if len(payload) > PAYLOAD_LIMIT:
        raise LimitExceeded(f"the exec's words have {len(payload)} bytes, over {PAYLOAD_LIMIT}")
    return payload


def encode_size(rows: int, columns: int) -> bytes:
    """A terminal's size; values outside 1 to 65535 become the nearest."""
    return number(Key.ROWS, min(max(rows, 1), 0xFFFF)) + number(
        Key.COLUMNS, min(max(columns, 1), 0xFFFF)
    )


def encode_connect(port: int, address: str = LOCALHOST) -> bytes:
    """The request for a TCP connection inside the guest; raises UsageError."""
    if not 0 < port < 65536:
        raise UsageError(f"port {port} is not between 1 and 65535")
    if not address or "\0" in address or len(address) > 64:
        raise UsageError(f"address {address[:80]!r} is not an IP address")
    return number(Key.PORT, port) + text(Key.ADDRESS, address)


def decode_stats(record: bytes) -> GuestStats:
    """The answer of a guest; raises Rejected where it is cut off, drops containers over the cap."""
    containers: dict[int, ContainerStats] = {}
    for key, value in fields(record):
        if key == Key.USAGE and len(containers) < STATS_CONTAINERS:
            used = numbers(value)
            containers[used.get(Key.CONTAINER, 0)] = ContainerStats(
                cpu_ns=used.get(Key.CPU_NS, 0),
                memory_bytes=used.get(Key.MEMORY_BYTES, 0),
                memory_limit=used.get(Key.MEMORY_LIMIT, 0),
                pids=used.get(Key.PIDS, 0),
                read_bytes=used.get(Key.READ_BYTES, 0),
                write_bytes=used.get(Key.WRITE_BYTES, 0),
                oom_kills=used.get(Key.OOM_KILLS, 0),
            )
    whole = numbers(record)
    return GuestStats(
        containers,
        memory_total=whole.get(Key.MEMORY_TOTAL, 0),
        memory_free=whole.get(Key.MEMORY_FREE, 0),
        received_bytes=whole.get(Key.RECEIVED_BYTES, 0),
        sent_bytes=whole.get(Key.SENT_BYTES, 0),
        cpu_ns=whole.get(Key.CPU_NS, 0),
    )
