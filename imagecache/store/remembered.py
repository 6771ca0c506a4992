"""What was found out about a store, kept in a host's state directory for a day.

Only hints: a wrong one costs a builder some work and never an object. `doctor` asks anew.
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

from blake3 import blake3

MAX_AGE_S = 86_400.0
_MAX_BYTES = 4096


class Remembered:
    """One file per store, named by a digest of what it is. All methods are blocking."""

    def __init__(self, directory: Path | None) -> None:
        """None: nothing is read or kept."""
        self._directory = directory

    def load(self, store: str, question: str) -> bool | None:
        """The answer, where there is one of the last day."""
        try:
            path = self._path(store)
            if path is None or not 0 <= time.time() - path.stat().st_mtime < MAX_AGE_S:
                return None
            with path.open("rb") as file:
                known = json.loads(file.read(_MAX_BYTES))
            answer = known.get(question) if isinstance(known, dict) else None
        except (OSError, ValueError, RecursionError):
            return None
        return answer if isinstance(answer, bool) else None

    def save(self, store: str, question: str, answer: bool) -> None:
        """Keeps an answer; where it cannot, the question is asked again."""
        path = self._path(store)
        if path is None:
            return
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            temporary.write_bytes(json.dumps({"store": store, question: answer}).encode())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def _path(self, store: str) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / f"{blake3(store.encode()).hexdigest(16)}.json"
