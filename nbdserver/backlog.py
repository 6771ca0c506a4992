"""Replies that did not fit into the socket: pinned, sent when it drains, or repaired after a fault.

A backlog owns the pins of its replies, from the send that stopped short until the last byte left.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Buffer = bytes | bytearray | memoryview
Pin = Callable[[int, int], Callable[[], None]]

IOV_MAX = 1024


def first_bytes(buffers: Sequence[Buffer], room: int) -> list[Buffer]:
    """The first `room` bytes, or fewer: at most IOV_MAX buffers."""
    parts: list[Buffer] = []
    for buffer in buffers[:IOV_MAX]:
        size = len(buffer)
        if size > room:
            if room:
                parts.append(memoryview(buffer)[:room])
            break
        parts.append(buffer)
        room -= size
    return parts


@dataclass(slots=True)
class Reply:
    """One reply waiting: `head`, then `buffers`; `sent` bytes of it are gone. Length 0: no data."""

    head: bytes
    buffers: Sequence[Buffer]
    offset: int = 0
    length: int = 0
    sent: int = 0
    release: Callable[[], None] | None = None
    mapped: bool = False

    def parts(self) -> list[Buffer]:
        """The buffers that are still to be sent."""
        parts: list[Buffer] = []
        skip = self.sent
        for buffer in (self.head, *self.buffers):
            size = len(buffer)
            if skip >= size:
                skip -= size
            elif skip:
                parts.append(memoryview(buffer)[skip:])
                skip = 0
            else:
                parts.append(buffer)
        return parts

    @property
    def total(self) -> int:
        """Bytes of the whole reply."""
        return len(self.head) + self.length

    def let_go(self) -> None:
        """Release the pin, once."""
        release, self.release = self.release, None
        if release is not None:
            release()


@dataclass(slots=True)
class Backlog:
    """Replies in the order in which they will leave."""

    replies: deque[Reply] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.replies)

    def add_plain(self, data: bytes) -> None:
        """Add replies without data, already encoded."""
        self.replies.append(Reply(data, ()))

    def add_reads(
        self,
        iov: Sequence[Buffer],
        ranges: Sequence[tuple[int, int, bool]],
        sent: int,
        pin: Pin,
    ) -> None:
        """Take over a batch of reads of which `sent` bytes are gone, and pin what is left.

        `iov` is, per range, a header and then buffers of the range's length together.
        """
        index = 0
        for offset, length, _hit in ranges:
            head = bytes(iov[index])
            first = index = index + 1
            size = 0
            while size < length:
                size += len(iov[index])
                index += 1
            total = len(head) + length
            if sent >= total:
                sent -= total
                continue
            self.replies.append(
                Reply(
                    head,
                    tuple(iov[first:index]),
                    offset,
                    length,
                    sent,
                    pin(offset, length),
                    mapped=True,
                )
            )
            sent = 0

    def parts(self, room: int) -> list[Buffer]:
        """Buffers for one send: at most `room` bytes, at most IOV_MAX of them."""
        parts: list[Buffer] = []
        size = 0
        for reply in self.replies:
            parts += reply.parts()
            size += reply.total - reply.sent
            if size >= room or len(parts) >= IOV_MAX:
                break
        return first_bytes(parts, room)

    def advance(self, sent: int) -> None:
        """`sent` bytes left: drop what is complete and release its pins."""
        replies = self.replies
        while sent:
            reply = replies[0]
            left = reply.total - reply.sent
            if sent < left:
                reply.sent += sent
                return
            sent -= left
            replies.popleft()
            reply.let_go()

    def clear(self) -> None:
        """Drop everything, and release every pin."""
        while self.replies:
            self.replies.popleft().let_go()
