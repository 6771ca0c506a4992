"""A request whose payload is still arriving, straight into the memory that the device will get."""

from dataclasses import dataclass

from nbdserver.payloads import PayloadPool
from nbdserver.protocol.requests import Request


@dataclass(slots=True)
class Arriving:
    """`view` is the payload's memory, `filled` how many bytes of it are there."""

    header: bytes
    request: Request
    view: memoryview
    filled: int

    @classmethod
    def begin(
        cls, pool: PayloadPool, request: Request, received: memoryview, header: int
    ) -> "Arriving":
        """From a header of `header` bytes and as much of the payload as came with it."""
        view = pool.take(request.payload)
        filled = len(received) - header
        view[:filled] = received[header:]
        return cls(bytes(received[:header]), request, view, filled)

    def fill(self, data: bytes) -> bytes:
        """Add to the payload; what is left belongs to the next request."""
        used = min(len(self.view) - self.filled, len(data))
        self.view[self.filled : self.filled + used] = data[:used]
        self.filled += used
        return data[used:]

    @property
    def whole(self) -> bool:
        """The payload is complete."""
        return self.filled == len(self.view)

    def received(self) -> bytes:
        """Header and payload as far as they came."""
        return self.header + bytes(self.view[: self.filled])
