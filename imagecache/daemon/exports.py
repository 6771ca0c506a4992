"""Live exports: devices bound to names, and the views of them that a socket's clients get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imagecache.cache.device import BlockImageDevice
from imagecache.cache.fill import Fill
from imagecache.cache.image import ImageMap
from imagecache.daemon.exporttable import ExportRecord
from imagecache.daemon.recording import ExportStart
from nbdserver.device import Device
from nbdserver.exports import UnknownExport
from nbdserver.overlay import OverlayDevice
from nbdserver.server import Listener


@dataclass(eq=False, slots=True)
class LiveExport:
    """One export that is being served, or the reason why it cannot be yet."""

    record: ExportRecord
    shared_socket: Path
    image: ImageMap | None = None
    device: BlockImageDevice | None = None
    overlay: OverlayDevice | None = None
    fill: Fill | None = None
    start: ExportStart | None = None
    listener: Listener | None = None
    failure: str | None = None
    stored: bool = True  # its image is committed; if not, it is read from the builder's spool
    clients: int = 0
    closing: bool = field(default=False)

    @property
    def socket(self) -> Path:
        """The unix socket on which a client finds it."""
        return Path(self.record.socket) if self.record.socket else self.shared_socket

    @property
    def served(self) -> Device | None:
        """What clients read: the image, or the overlay over it."""
        return self.overlay or self.device

    @property
    def uri(self) -> str:
        """`nbd+unix:///NAME?socket=PATH`."""
        return f"nbd+unix:///{quote(self.record.name)}?socket={quote(str(self.socket))}"

    def as_json(self) -> dict[str, Any]:
        """What the API and `export --json` answer."""
        record = self.record
        progress = self.fill.progress if self.fill else None
        return {
            "name": record.name,
            "uri": self.uri,
            "socket": str(self.socket),
            "own_socket": record.socket is not None,
            "reference": record.reference,
            "image": record.image,
            "block_image": record.block_image,
            "fs": record.face,
            "size_bytes": record.size_bytes,
            "writable": bool(record.writable),
            "clients": self.clients,
            "state": "failed" if self.failure and self.device is None else "serving",
            "failure": self.failure,
            "stored": self.stored,
            "fill": None
            if progress is None
            else {
                "mode": str(progress.mode),
                "state": str(progress.state),
                "chunks": progress.chunks,
                "chunks_total": progress.chunks_total,
                "bytes": progress.bytes,
                "bytes_total": progress.bytes_total,
                "failed": progress.failed,
                "error": progress.error,
            },
            "start": None if self.start is None else self.start.summary(),
            "config": json.loads(record.config),
        }


class ExportView:
    """The exports that the clients of one socket may name; nbdserver's Exports protocol."""

    def __init__(self, live: dict[str, LiveExport], only: str | None = None) -> None:
        self._live = live
        self._only = only

    def _visible(self, name: str) -> LiveExport | None:
        export = self._live.get(name)
        if export is None or export.closing:
            return None
        if self._only is not None:
            return export if name == self._only else None
        return export if export.record.socket is None else None

    def names(self) -> Sequence[str] | None:
        """Names to list: those of this socket, never those alone on another."""
        return sorted(name for name in self._live if self._visible(name))

    async def open(self, name: str) -> Device:
        """The device of that name; UnknownExport, the same for hidden and absent ones."""
        if not name and self._only is not None:
            name = self._only
        export = self._visible(name)
        device = None if export is None else export.served
        if export is None or device is None:
            raise UnknownExport(name)
        export.clients += 1
        return device

    async def leave(self, name: str, device: Device) -> None:
        """A client is gone; an export that went meanwhile needs no count."""
        export = self._live.get(name or self._only or "")
        if export is not None and export.served is device:
            export.clients -= 1
