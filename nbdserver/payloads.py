"""Memory for payloads larger than the receive buffer, kept for the next one where it is safe.

Fresh anonymous memory is committed as it is filled: who announces much and sends little costs
little. Memory that is used again needs no page faults, which cost more than the copying.
"""

import mmap

_SMALL = 4 << 10
_KEPT_BYTES = 16 << 20
_KEPT_SIZES = (64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20)


class PayloadPool:
    """Buffers of one event loop. `give_back` only what nobody can still be reading."""

    def __init__(self) -> None:
        self._kept: dict[int, list[mmap.mmap]] = {size: [] for size in _KEPT_SIZES}
        self._kept_bytes = 0

    def take(self, length: int) -> memoryview:
        """Writable memory of `length` bytes, of any content."""
        if length <= _SMALL:
            return memoryview(bytearray(length))
        for size, kept in self._kept.items():
            if length <= size:
                if kept:
                    self._kept_bytes -= size
                    return memoryview(kept.pop())[:length]
                return memoryview(mmap.mmap(-1, size))[:length]
        return memoryview(mmap.mmap(-1, length))

    def give_back(self, view: memoryview) -> None:
        """Keep the memory of a view that `take` answered, if there is room for it."""
        memory = view.obj
        view.release()
        if isinstance(memory, mmap.mmap):
            size = len(memory)
            if size in self._kept and self._kept_bytes + size <= _KEPT_BYTES:
                self._kept[size].append(memory)
                self._kept_bytes += size
