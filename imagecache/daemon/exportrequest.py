"""What an export is asked for as: the request, its checks, its name, the run configuration."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from imagecache.blockimage.manifest import MAX_LAYERS
from imagecache.blockimage.records import MAX_RECORD, RootRecord
from imagecache.composition import ImageRequest
from imagecache.errors import UsageError
from imagecache.oci.config import parse_config
from imagecache.settings import FILLS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export and how; None where the daemon decides."""

    image: ImageRequest
    socket: str | None = None
    name: str | None = None
    fill: str | None = None
    record: bool = False
    owner: str = ""
    writable: bool = False

    def check(self) -> None:
        """Raises UsageError for what cannot be a name, a fill or a socket."""
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise UsageError(
                f"export name {self.name!r} is malformed",
                remedy="use letters, digits, dots, dashes and underscores",
            )
        if self.fill is not None and self.fill not in FILLS:
            raise UsageError(f"fill {self.fill!r} is unknown", remedy="whole, hot or none")
        if self.socket is not None and not Path(self.socket).is_absolute():
            raise UsageError(f"socket path {self.socket!r} is not absolute")

    def name_for(self, root: RootRecord) -> str:
        """The export's name: as asked, or made; an owner's begins with the owner."""
        name = self.name
        if name is None:
            name = export_name(self.image.reference, root, self.socket)
            if self.writable:
                name += "-rw"
        # So that owners cannot meet in a name.
        return f"{self.owner}.{name}" if self.owner else name


def export_name(reference: str, root: RootRecord, own_socket: str | None) -> str:
    """The name of an export nobody named: the repository's last part and the image's digest.

    An export on its own socket adds a digest of the socket's path, so that two VMs of one image
    have two exports.
    """
    last = re.split(r"[@:]", reference.rpartition("/")[2])[0]
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", last).strip(".-_") or "image"
    name = f"{plain[:40]}-{root.block_image[:12]}"
    if own_socket is not None:
        name += "-" + hashlib.sha256(own_socket.encode()).hexdigest()[:8]
    return name


def run_config(root: RootRecord, raw: bytes) -> str:
    """An image's run configuration as JSON text, from its OCI config; Rejected, LimitExceeded."""
    config = parse_config(
        raw, limit=MAX_RECORD, max_layers=MAX_LAYERS, what=f"config {root.config}"
    )
    return json.dumps(
        {
            "entrypoint": config.entrypoint,
            "cmd": config.cmd,
            "env": config.env,
            "user": config.user,
            "working_dir": config.working_dir,
            "stop_signal": config.stop_signal,
        }
    )
