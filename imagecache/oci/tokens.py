"""Authorization for one repository of one registry: Basic, or Bearer with a token server.

Sources: docker token authentication and OAuth2 documents of the distribution project.
State: the Authorization value in use, its end, and the one renewal under way; however many
downloads meet a refusal together, one renewal answers them all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from yarl import URL

from imagecache.errors import Denied, LimitExceeded
from imagecache.oci.challenge import Challenge, Token, parse_challenges, parse_token
from imagecache.oci.credentials import Credentials
from imagecache.oci.origin import Origin, check_realm
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.transport import Transport, check_status

_CLIENT = "cubecache"

FindCredentials = Callable[[], Awaitable[Credentials | None]]


class Authorization:
    """Holds and renews what goes into the Authorization header for pulls from one repository."""

    def __init__(
        self,
        transport: Transport,
        repository: str,
        settings: RegistrySettings,
        find: FindCredentials,
    ) -> None:
        self._transport = transport
        self._home: Origin = transport.home
        self._scope = f"repository:{repository}:pull"
        self._settings = settings
        self._find = find
        self._value: str | None = None
        self._until: float | None = None
        self._challenge: Challenge | None = None
        self._renewal: asyncio.Task[None] | None = None

    async def current(self) -> str | None:
        """The value to send now, renewed ahead of its end; None before any challenge."""
        if self._until is not None and time.monotonic() >= self._until:
            await self.renew(self._value, ())
        return self._value

    async def renew(self, refused: str | None, headers: Sequence[str]) -> None:
        """Get a new value after `refused` was refused with these WWW-Authenticate headers.

        Returns at once where somebody else has renewed since. Raises `Denied` where there is
        nothing to try, and what the token server's failure was.
        """
        if self._value != refused:
            return
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(list(headers)), name="oci-token")
            self._renewal.add_done_callback(self._renewed)
        await asyncio.shield(self._renewal)

    def _renewed(self, task: asyncio.Task[None]) -> None:
        self._renewal = None
        if not task.cancelled():
            task.exception()  # every waiter has it; with none left it is nobody's

    def can_renew(self) -> bool:
        """Whether a refusal (403) may be due to a token that has aged."""
        return self._challenge is not None and self._challenge.scheme == "bearer"

    async def close(self) -> None:
        """End a renewal under way."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})

    async def _renew(self, headers: list[str]) -> None:
        challenges = parse_challenges(headers)
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        challenge = by_scheme.get("bearer") or by_scheme.get("basic") or self._challenge
        where = f"registry {self._home.host_and_port}"
        if challenge is None or challenge.scheme not in {"bearer", "basic"}:
            raise Denied(
                f"{where}: auth required, and it does not say how",
                remedy="check the registry's name and its settings",
            )
        self._challenge = challenge
        credentials = await self._find()
        if challenge.scheme == "basic":
            value = credentials.basic() if credentials is not None else None
            if value is None or value == self._value:
                raise refusal(self._home, known=value is not None)
            self._value, self._until = value, None
            return
        if credentials is not None and credentials.registry_token:
            value = f"Bearer {credentials.registry_token}"
            if value == self._value:
                raise refusal(self._home, known=True)
            self._value, self._until = value, None
            return
        token = await self._ask(challenge, credentials)
        self._value = f"Bearer {token.value}"
        self._until = time.monotonic() + token.lifetime * 0.9

    async def _ask(self, challenge: Challenge, credentials: Credentials | None) -> Token:
        """One request to the token server that the challenge names."""
        where = f"the token server of registry {self._home.host_and_port}"
        try:
            realm = URL(challenge.parameters.get("realm", ""))
            if not realm.absolute or realm.raw_user or realm.raw_password:
                raise ValueError("realm")
        except ValueError:
            raise Denied(f"{where} is not named by a usable URL") from None
        basic = credentials.basic() if credentials is not None else None
        identity = credentials.identity_token if credentials is not None else ""
        check_realm(
            self._home,
            realm,
            with_credentials=bool(basic or identity),
            settings=self._settings,
        )
        # The scope is ours, not the challenge's: a server cannot widen what a token may do.
        query = {"scope": self._scope}
        if service := challenge.parameters.get("service"):
            query["service"] = service
        form: dict[str, str] | None = None
        if identity:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": identity,
                "client_id": _CLIENT,
                **query,
            }
            url = realm.with_fragment(None)
        else:
            url = realm.with_fragment(None).extend_query(query)
        limit = self._settings.limits.token_bytes
        async with self._transport.send(
            url,
            headers={"Accept": "application/json"},
            authorization=None if identity else basic,
            what=where,
            form=form,
        ) as reply:
            if reply.status in {400, 401, 403}:
                raise refusal(self._home, known=bool(basic or identity))
            check_status(reply, where)
            raw = await read_capped(reply.response.content, limit, where)
        return parse_token(raw, limit=limit, what=f"the answer of {where}")


def refusal(home: Origin, *, known: bool) -> Denied:
    """The error of a registry that wants other credentials than it got."""
    host = home.host_and_port
    if known:
        return Denied(f"registry {host} refuses our credentials", remedy=f"docker login {host}")
    return Denied(
        f"registry {host}: auth required, and there are no credentials for it",
        remedy=f"docker login {host}",
    )


async def read_capped(stream: aiohttp.StreamReader, limit: int, what: str) -> bytes:
    """Read a body to its end; raises `LimitExceeded` as soon as it is over `limit` bytes."""
    body = bytearray()
    while piece := await stream.readany():
        body += piece
        if len(body) > limit:
            raise LimitExceeded(f"{what} answers with more than {limit} bytes")
    return bytes(body)
