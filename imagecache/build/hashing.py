"""The diff id's hash on a thread of its own, so that parsing does not wait for it."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

_IN_FLIGHT = 4
"""Pieces between the parser and the hash: 4 MiB at the most."""


class ThreadedHash:
    """A hashlib object fed in order behind its caller; SHA-2 releases the interpreter lock."""

    def __init__(self, algorithm: str) -> None:
        """ValueError for an algorithm that hashlib does not know."""
        self._hash = hashlib.new(algorithm)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pending: deque[Future[None]] = deque()

    def update(self, data: bytes, /) -> None:
        """Takes the next bytes; waits while too many are under way."""
        if len(self._pending) >= _IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._hash.update, data))

    def hexdigest(self) -> str:
        """The digest of all that was taken."""
        self._pool.shutdown()
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()
