"""The control API's handler of upgrades."""

from __future__ import annotations

from aiohttp import web

from imagecache.daemon.access import Role
from imagecache.daemon.operations import Call, operation
from imagecache.daemon.upgrade import Upgrade


class UpgradeRoutes:
    """One method per operation."""

    def __init__(self, upgrade: Upgrade) -> None:
        self._upgrade = upgrade

    @operation(
        "POST",
        "/v1/upgrade",
        role=Role.ADMIN,
        answers={200: "Upgrade"},
        problems=(409, 422, 501, 503, 507),
    )
    async def upgrade(self, call: Call) -> web.Response:
        """Start the version that is on disk and hand everything over to it, without a drop."""
        call.caller.require_whole("the daemon")
        return web.json_response(await self._upgrade.run())
