"""The arena's index on disk: which chunk was in which slot when it was last written down.

A hint, never a proof: rows may be older or newer than the slots after a crash, so nothing of it is
shown before its digest matched. What cannot be read is set aside and rebuilt from the slots; an
index of a newer version is refused. Blocking calls, made from one thread of the arena's.
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import sqlite_utils

from imagecache.cache.slotfile import set_aside
from imagecache.chunks import DIGEST_BYTES
from imagecache.errors import Unsupported

SCHEMA = 1
KEPT_QUARANTINES = 1000
_LOCK_SECONDS = 1.0


class SlotIndex:
    """Rows (slot, digest, blocks) in SQLite; calls come one at a time, from any thread."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the index; Unsupported for a newer schema.

        `lost` tells that there was none, or none that can be read: then it is new and empty.
        """
        self.path = path
        self.lost = False
        try:
            self._db = self._open()
        except sqlite3.Error:
            self._start_afresh()

    def _open(self) -> sqlite_utils.Database:
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            self.lost = True
        else:
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not found.st_size:
                self._set_aside()
                self.lost = True
        connection = sqlite3.connect(self.path, timeout=_LOCK_SECONDS, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return sqlite_utils.Database(connection)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise Unsupported(
                f"cache index {self.path} has version {version}; this program knows {SCHEMA}",
                remedy="upgrade cubecache, or remove the file to rebuild it",
            )
        if version != SCHEMA and not self.lost:
            raise sqlite3.DatabaseError(f"schema {version} is older than {SCHEMA}")
        connection.execute("PRAGMA journal_mode = WAL")
        # After a power cut the newest rows may be missing or name bytes that never arrived: both
        # are found on first use, so a commit need not wait for the disk; the file stays whole.
        connection.execute("PRAGMA synchronous = NORMAL")
        if self.lost:
            db = sqlite_utils.Database(connection)
            db.table("chunks").create(
                {"slot": int, "digest": bytes, "blocks": int}, pk="slot", not_null={"digest"}
            )
            db.table("quarantine").create(
                {"id": int, "slot": int, "digest": bytes, "reason": str}, pk="id"
            )
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.commit()

    def _set_aside(self) -> None:
        for suffix in ("-wal", "-shm"):
            set_aside(self.path.with_name(self.path.name + suffix))
        set_aside(self.path)

    def _start_afresh(self) -> None:
        self._set_aside()
        self._db = self._open()
        self.lost = True

    def rows(self) -> Iterator[tuple[int, bytes, int]]:
        """Every row that is well formed; a damaged index ends early, empty, and `lost`."""
        try:
            for slot, digest, blocks in self._db.execute("SELECT slot, digest, blocks FROM chunks"):
                well_formed = isinstance(digest, bytes) and len(digest) == DIGEST_BYTES
                if well_formed and isinstance(blocks, int) and isinstance(slot, int):
                    yield slot, digest, blocks
        except sqlite3.Error:
            self._db.conn.close()
            self._start_afresh()

    def apply(self, changes: Mapping[int, tuple[bytes, int] | None]) -> None:
        """Writes rows by slot; None deletes. Raises OSError where the database refuses."""
        try:
            with self._db.conn:
                self._db.conn.executemany(
                    "DELETE FROM chunks WHERE slot = ?", [(slot,) for slot in changes]
                )
                self._db.table("chunks").insert_all(
                    (
                        {"slot": slot, "digest": row[0], "blocks": row[1]}
                        for slot, row in changes.items()
                        if row is not None
                    ),
                    replace=True,
                )
        except sqlite3.Error as error:
            raise OSError(f"cache index {self.path}: {error}") from error

    def quarantined(self, slot: int, digest: bytes, reason: str) -> None:
        """Keeps evidence of a chunk that did not match, the newest thousand."""
        try:
            table = self._db.table("quarantine")
            table.insert({"slot": slot, "digest": digest, "reason": reason})
            self._db.conn.execute(
                "DELETE FROM quarantine WHERE id <= (SELECT max(id) - ? FROM quarantine)",
                (KEPT_QUARANTINES,),
            )
            self._db.conn.commit()
        except sqlite3.Error as error:
            raise OSError(f"cache index {self.path}: {error}") from error

    def close(self) -> None:
        """Ends the connection."""
        self._db.conn.close()
