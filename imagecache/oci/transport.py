"""One HTTP GET or POST with its redirects: sessions, TLS, address checks, header caps.

What it must never do: send Authorization to an origin other than the one it was given for,
decode a body, keep cookies, or read proxies and credentials from the environment.
State: two aiohttp sessions. `direct` speaks to the origin that the user named; `guarded`
speaks to every other place, and its sockets refuse addresses that are not public.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from imagecache.errors import CubecacheError, Denied, LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.oci.origin import Origin, address_allowed, host_named, next_hop, origin_of
from imagecache.oci.settings import RegistrySettings

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_READ_BUFFER = 1 << 20
_OVER_THE_CAPS = ("Got more than", "Too many")  # how aiohttp's parser words its header caps


class Retryable(Unavailable):
    """A failure that another attempt may get past; `retry_after` is the server's own header."""

    def __init__(self, message: str, *, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OriginProtocol(Unavailable):
    """The origin broke HTTP's or the distribution API's rules in its reply."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response whose headers have arrived, after redirects; `at_home`: from the named origin."""

    response: aiohttp.ClientResponse
    origin: Origin
    at_home: bool

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return self.response.headers.get(name)


class Transport:
    """Sends requests for one named origin; made inside a running loop, ended by `close()`."""

    def __init__(
        self,
        home: Origin,
        settings: RegistrySettings,
        *,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.home = home
        self._settings = settings
        self._resolver = resolver
        self._direct: aiohttp.ClientSession | None = None
        self._guarded: aiohttp.ClientSession | None = None
        self._tls: dict[bool, ssl.SSLContext] = {}
        self._tls_lock = asyncio.Lock()

    async def close(self) -> None:
        """Close every connection."""
        for session in (self._direct, self._guarded):
            if session is not None:
                await session.close()
        self._direct = self._guarded = None

    @asynccontextmanager
    async def send(
        self,
        url: URL,
        *,
        headers: Mapping[str, str],
        authorization: str | None = None,
        what: str,
        form: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Reply]:
        """GET `url` (POST where there is a form), following up to the limit of redirects.

        `authorization` goes to the origin of `url` alone. A POST is never redirected.
        Raises `Denied` (places we do not go, certificates), `LimitExceeded`, `Retryable`.
        """
        owner = origin_of(url)
        for _ in range(self._settings.limits.redirects + 1):
            here = origin_of(url)
            sent = dict(headers)
            if authorization is not None and here == owner:
                sent["Authorization"] = authorization
            response = await self._head(url, here, sent, form, what)
            try:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    yield Reply(response, here, here == self.home)
                    return
                if form is not None:
                    raise Denied(f"{what}: {here.host_and_port} redirects a login")
                url = next_hop(url, location, self._settings, what)
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._mapped(error, here, what) from None
            finally:
                # What is unread is never drained: its length is the server's choice.
                response.close()
        raise Denied(f"{what}: more than {self._settings.limits.redirects} redirects")

    async def _head(
        self,
        url: URL,
        here: Origin,
        headers: dict[str, str],
        form: Mapping[str, str] | None,
        what: str,
    ) -> aiohttp.ClientResponse:
        known = here == self.home or host_named(self._settings.allowed_private, here)
        session = self._session(guarded=not known)
        tls = await self._context(here) if here.scheme == "https" else True
        try:
            async with asyncio.timeout(self._settings.limits.head_seconds):
                return await session.request(
                    "GET" if form is None else "POST",
                    url,
                    headers=headers,
                    data=form,
                    allow_redirects=False,
                    ssl=tls,
                )
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise self._mapped(error, here, what) from None

    def _session(self, *, guarded: bool) -> aiohttp.ClientSession:
        if guarded:
            self._guarded = self._guarded or self._make_session(self._guarded_socket)
            return self._guarded
        self._direct = self._direct or self._make_session(None)
        return self._direct

    def _make_session(self, factory: Any) -> aiohttp.ClientSession:
        limits = self._settings.limits
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=64,
                resolver=self._resolver,
                # A guarded name is looked up and judged anew for each connection.
                use_dns_cache=factory is None,
                socket_factory=factory,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            raise_for_status=False,
            read_bufsize=_READ_BUFFER,
            max_line_size=limits.header_line_bytes,
            max_field_size=limits.header_line_bytes,
            max_headers=limits.header_lines,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=None,
                sock_connect=limits.connect_seconds,
                sock_read=None,
            ),
            headers={"User-Agent": "cubecache", "Accept-Encoding": "identity"},
        )

    def _guarded_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Make the socket for one resolved address, or refuse the address (no host name here)."""
        family, kind, protocol, _, address = info
        if not address_allowed(str(address[0]), self._settings):
            raise AddressRefused(str(address[0]))
        return socket.socket(family=family, type=kind, proto=protocol)

    async def _context(self, here: Origin) -> ssl.SSLContext:
        """The TLS context for a host, made once, in a thread: reading a CA store blocks."""
        insecure = host_named(self._settings.insecure_tls_hosts, here)
        async with self._tls_lock:
            if insecure not in self._tls:
                self._tls[insecure] = await asyncio.to_thread(
                    _make_context, self._settings.ca_file, insecure
                )
            return self._tls[insecure]

    def _mapped(self, error: Exception, here: Origin, what: str) -> CubecacheError:
        """One table from what aiohttp raises to what our callers can act on."""
        where = here.host_and_port
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
            reason = _tls_reason(error)
            return Denied(
                f"{what}: TLS with {where} failed: {reason}",
                remedy="name the CA file, or opt in to insecure TLS or plain HTTP for this host",
            )
        if isinstance(error, aiohttp.ClientConnectorError):
            cause = error.os_error
            if cause.errno == errno.EACCES or isinstance(cause, AddressRefused):
                return Denied(
                    f"{what}: refusing to go on to {where}: its address is not a public one",
                    remedy="allow this private host if that is meant",
                )
            return Retryable(f"{what}: cannot connect to {where}: {cause.strerror or cause}")
        if isinstance(error, aiohttp.InvalidURL | ValueError):
            return Denied(f"{what}: refusing a malformed URL at {where}")
        if isinstance(error, aiohttp.ClientResponseError):
            if error.message.startswith(_OVER_THE_CAPS):
                return LimitExceeded(f"{what}: {where} sent headers over the limit")
            return OriginProtocol(f"{what}: {where} did not answer in HTTP")
        if isinstance(error, TimeoutError):
            return Retryable(f"{what}: {where} did not answer in time")
        return Retryable(f"{what}: the connection to {where} broke ({type(error).__name__})")


class AddressRefused(PermissionError):
    """Raised inside the connector for an address that is not allowed."""

    def __init__(self, address: str) -> None:
        super().__init__(errno.EACCES, f"address {address} is not public")


def _make_context(ca_file: Path | None, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except (OSError, ssl.SSLError):
        raise Denied(f"cannot read the CA file {ca_file}", remedy="it must hold PEM") from None
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _tls_reason(error: Exception) -> str:
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    return getattr(cause, "reason", None) or type(cause or error).__name__


def check_status(reply: Reply, what: str) -> None:
    """Raise the error of a final status that is not a success; 401 and 403 are the caller's."""
    status, where = reply.status, reply.origin.host_and_port
    if 200 <= status < 300 or status == 416:
        return
    if status == 404:
        raise NotFound(f"{what}: {where} does not have it")
    if status in {408, 425, 429} or status >= 500:
        raise Retryable(
            f"{what}: {where} answers {status}", retry_after=reply.header("Retry-After")
        )
    if status in {401, 403}:
        raise Denied(f"{what}: {where} refuses ({status})", remedy="check the credentials")
    plain = status == 400 and reply.origin.scheme == "http"
    raise Rejected(
        f"{what}: {where} answers {status}",
        remedy="if it speaks TLS, list it among the TLS hosts" if plain else None,
    )
