"""What a Firecracker leaves in its machine's directory: to be taken over, or to be cleared away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cube.channel.vsock import connect_vsock
from cube.errors import MachineFailed
from cube.vm.adopted import AdoptedMachine, handle_of
from cube.vm.bridge import PROGRAM as BRIDGE
from cube.vm.bridge import RECORD, end_left_behind, left_behind
from cube.vm.firecracker_config import LOG_NAME, METRICS_NAME, VSOCK_NAME
from cube.vm.jailer import Jail
from imagecache.errors import Rejected, Unavailable

API_NAME: Final = "api.sock"
JAIL_LINK: Final = "jail"  # in the machine's directory, to its jail
_GROUPS: Final = "jail.cgroups"  # beside it: the control groups to remove, a line each
_ADOPT_SECONDS: Final = 10.0


class AdoptedFirecracker(AdoptedMachine):
    """An earlier keeper's Firecracker, with what else its directory holds."""

    directory: Path
    _bridge = -1

    def guard(self, pid: int) -> None:
        """Ends the machine when this process, its bridge, ends; raises OSError."""
        self._bridge = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._bridge, self._lose_bridge)

    async def stop(self) -> None:
        self._let_bridge_go()
        await super().stop()
        await asyncio.to_thread(clear_left_behind, self.directory)

    def _lose_bridge(self) -> None:
        self._let_bridge_go()
        self.kill()

    def _let_bridge_go(self) -> None:
        if self._bridge >= 0:
            asyncio.get_running_loop().remove_reader(self._bridge)
            os.close(self._bridge)
            self._bridge = -1


async def adopt_firecracker(process_id: int, started: int, directory: Path) -> AdoptedFirecracker:
    """A machine that an earlier process of ours started; raises MachineFailed."""
    link = directory / JAIL_LINK
    home = link / "root" if link.is_symlink() else directory
    descriptor = handle_of(process_id, started)
    try:
        bridge = left_behind(directory)
        if (directory / RECORD).exists() and not bridge:
            raise MachineFailed(f"the machine's {BRIDGE} is gone")
        with reached(home) as place:
            reader, writer = await connect_vsock(place / VSOCK_NAME, seconds=_ADOPT_SECONDS)
    except (OSError, Unavailable, Rejected) as error:
        os.close(descriptor)
        if isinstance(error, MachineFailed):
            raise
        raise MachineFailed(f"the machine's channel does not answer: {error}") from error
    except BaseException:
        os.close(descriptor)
        raise
    path = home / VSOCK_NAME
    machine = AdoptedFirecracker(process_id, descriptor, reader, writer, path)
    machine.directory = directory
    if bridge:
        try:
            machine.guard(bridge)
        except OSError as error:
            await machine.stop()
            raise MachineFailed(f"the machine's {BRIDGE} is gone") from error
    return machine


def record_jail(directory: Path, jail: Jail) -> None:
    """Notes what `clear_left_behind` has to remove, if nobody else does; raises OSError."""
    (directory / _GROUPS).write_text("".join(f"{group}\n" for group in jail.groups()))
    (directory / JAIL_LINK).symlink_to(jail.base)


def clear_left_behind(directory: Path) -> None:
    """Ends the bridge that serves a machine's disks, and removes its sockets, pipes and jail.

    For machines whose process has ended. Blocking.
    """
    end_left_behind(directory)
    link = directory / JAIL_LINK
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
        with contextlib.suppress(OSError):
            for group in (directory / _GROUPS).read_text().splitlines():
                with contextlib.suppress(OSError):
                    Path(group).rmdir()
        remove(link, directory / _GROUPS)
    remove(*(directory / name for name in (API_NAME, VSOCK_NAME, LOG_NAME, METRICS_NAME)))


@contextlib.contextmanager
def reached(home: Path) -> Iterator[Path]:
    """The directory by way of a descriptor: a socket's path has 107 bytes at most."""
    descriptor = os.open(home, os.O_PATH | os.O_DIRECTORY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def remove(*paths: Path) -> None:
    """Removes files that may not be there."""
    for path in paths:
        path.unlink(missing_ok=True)
