"""Every cap and deadline of the server, in one frozen record that `PROTOCOL.md` lists."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bytes, counts and seconds; a reason for each stands in PROTOCOL.md's limits table."""

    connections: int = 4096
    connections_per_listener: int = 2048
    handshake_seconds: float = 10.0
    options: int = 100
    option_bytes: int = 64 << 10
    listed_exports: int = 10_000
    receive_bytes: int = 256 << 10
    batch_bytes: int = 1 << 20
    linger_seconds: float = 60e-6
    inflight_requests: int = 256
    inflight_bytes: int = 64 << 20
    drained_payload_bytes: int = 64 << 20
    stalled_seconds: float = 30.0
    request_seconds: float = 300.0
    drain_seconds: float = 10.0
    send_buffer_bytes: int = 1 << 20
    extents: int = 64 << 10
