"""NBD URIs: nbd, nbds (TLS), nbd+unix and nbds+unix, parsed strictly and written canonically."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

DEFAULT_PORT = 10809


@dataclass(frozen=True)
class NbdUri:
    """Where an export is: a unix socket or a TCP address, its name, and whether over TLS."""

    export: str = ""
    unix: Path | None = None
    host: str | None = None
    port: int = DEFAULT_PORT
    tls: bool = False

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        name = quote(self.export, safe="/")
        if self.unix is not None:
            return f"{scheme}+unix:///{name}?socket={quote(str(self.unix), safe='/')}"
        host = self.host or "localhost"
        if ":" in host:
            host = f"[{host}]"
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{name}"


def parse_uri(text: str) -> NbdUri:
    """Raises ValueError, naming what is wrong."""
    parts = urlsplit(text)
    schemes = {"nbd": False, "nbds": True, "nbd+unix": False, "nbds+unix": True}
    if parts.scheme not in schemes:
        raise ValueError(f"{parts.scheme!r} is no NBD scheme")
    if parts.fragment or parts.username or parts.password:
        raise ValueError("an NBD URI has no user, password or fragment here")
    if not parts.path.startswith("/") and parts.path:
        raise ValueError("an NBD URI's path starts with a slash")
    export = unquote(parts.path[1:], errors="strict")
    query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    tls = schemes[parts.scheme]
    if parts.scheme.endswith("+unix"):
        sockets = query.pop("socket", [])
        if len(sockets) != 1 or parts.netloc or query:
            raise ValueError("a unix NBD URI has no host, and one query parameter, socket")
        return NbdUri(export, unix=Path(sockets[0]), tls=tls)
    if query or not parts.hostname:
        raise ValueError("a TCP NBD URI has a host, and no query parameters here")
    return NbdUri(export, host=parts.hostname, port=parts.port or DEFAULT_PORT, tls=tls)
