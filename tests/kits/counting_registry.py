"""A registry of one image on loopback that counts what it sends of each blob."""

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 64 << 10


class CountingRegistry:
    """Serves `oci:FOLDER` as any repository and tag; `sent` is bytes by digest."""

    def __init__(self, folder: Path) -> None:
        self.sent: dict[str, int] = {}
        self._lock = threading.Lock()
        blobs = folder / "blobs/sha256"
        index = json.loads((folder / "index.json").read_bytes())
        manifest = (blobs / index["manifests"][0]["digest"].partition(":")[2]).read_bytes()
        kind = index["manifests"][0]["mediaType"]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                if "/manifests/" in self.path:
                    self._head(200, len(manifest), ("Content-Type", kind))
                    self.wfile.write(manifest)
                elif "/blobs/" in self.path:
                    self._blob(name, blobs / name.partition(":")[2])
                else:
                    self._head(200, 0)

            def _head(self, status: int, length: int, *headers: tuple[str, str]) -> None:
                self.send_response(status)
                for header in (("Content-Length", str(length)), *headers):
                    self.send_header(*header)
                self.end_headers()

            def _blob(self, name: str, path: Path) -> None:
                # What waits in buffers when a client is killed counts as sent: keep it small.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
                size = path.stat().st_size
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(asked[1]) if asked else 0
                told = f"bytes {start}-{size - 1}/{size}"
                self._head(206 if asked else 200, size - start, ("Content-Range", told))
                with path.open("rb") as file:
                    file.seek(start)
                    try:
                        while piece := file.read(PIECE):
                            self.wfile.write(piece)
                            with outer._lock:
                                outer.sent[name] = outer.sent.get(name, 0) + len(piece)
                    except OSError:
                        self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Clients that were killed are what this is for."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.digest = "sha256:" + hashlib.sha256(manifest).hexdigest()
        self.layers = [layer["digest"] for layer in json.loads(manifest)["layers"]]
        self.bytes = sum(layer["size"] for layer in json.loads(manifest)["layers"])

    def __enter__(self) -> "CountingRegistry":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)

    @property
    def layer_bytes(self) -> int:
        """What was sent of layers."""
        with self._lock:
            return sum(self.sent.get(digest, 0) for digest in self.layers)


class SilentRegistry:
    """Takes connections and never says a word."""

    def __enter__(self) -> "SilentRegistry":
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
