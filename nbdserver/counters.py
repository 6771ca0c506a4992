"""Counters of a server: plain integers, one owner (the event loop), cheap to read at any time."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the server began, but `connections`, which is the number open now.

    `hits` are reads answered from memory in their batch, `misses` reads that had to wait; many
    `stalls` mean clients that read too slowly, many `faults` a disk or file that fails under a map.
    """

    accepted: int = 0
    refused: int = 0
    connections: int = 0
    handshakes_failed: int = 0
    hits: int = 0
    misses: int = 0
    writes: int = 0
    other_requests: int = 0
    errors: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    partial_sends: int = 0
    stalls: int = 0
    faults: int = 0
    violations: int = 0
