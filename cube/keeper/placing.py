"""What a pod's machine is made of: its images exported, its disks, its configuration."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from cube.configdisk import SERIAL, encode_config
from cube.container import ImageDefaults
from cube.guest.assets import GuestFiles
from cube.keeper import status as words
from cube.keeper.backoff import BackOff
from cube.keeper.disks import claim_socket, provide_disk
from cube.keeper.guestplan import (
    TOOLS_SERIAL,
    Facts,
    Image,
    Plan,
    container_ids,
    directory_of,
    plan_machine,
    root_serial,
)
from cube.keeper.pull import export_image
from cube.keeper.status import PodStatus
from cube.pod.model import Container, NfsVolume, ObjectVolume, Pod, Volume
from cube.vm.seam import (
    Disk,
    Driver,
    FileDisk,
    Forward,
    MachineSpec,
    NbdDisk,
    Rates,
    UserNic,
    VhostUserDisk,
)
from imagecache.errors import CubecacheError, NoSpace, Unavailable, Unsupported
from preload.client import Client, ExportHandle

_RESOLVE_SECONDS: Final = 10.0

# QEMU's user-mode network: the guest's address, the host seen from it, its name server.
USER_ADDRESS: Final = "10.0.2.15"
USER_GATEWAY: Final = "10.0.2.2"
USER_NAMESERVER: Final = "10.0.2.3"
LOCAL_ADDRESS: Final = "127.0.1.1"
FIRECRACKER: Final = "firecracker"


@dataclass(frozen=True, slots=True)
class Equipment:
    """What machines of this host are started with."""

    driver: Driver
    files: GuestFiles
    cache: Path


class PlacingHost(Protocol):
    """What placing needs of the keeper."""

    @property
    def state(self) -> Path: ...

    async def client(self) -> Client: ...

    async def tools_disk(self) -> Path: ...


class Placing:
    """Prepares one pod's machines; `handles` are its exports by container."""

    def __init__(
        self, host: PlacingHost, pod: Pod, status: PodStatus, on_change: Callable[[], None]
    ) -> None:
        self.handles: dict[str, ExportHandle] = {}
        self._host = host
        self._pod = pod
        self._status = status
        self._on_change = on_change
        self._directory = directory_of(host.state, status.uid)
        self._ids = container_ids(pod)
        self._formatted = False

    async def place(
        self, equipment: Equipment, images: dict[str, Image], sync_key: bytes
    ) -> MachineSpec:
        """The machine to start, its disks made; raises what cannot be had."""
        networked = equipment.driver.name != FIRECRACKER
        facts = self._facts() if networked else self._lonely()
        pod = await _resolved(self._pod)
        plan = plan_machine(pod, images, facts, sync_key=sync_key)
        disks = await self._provide(plan)
        self._status.address = facts.address if networked else ""
        self._status.machine = {
            "driver": equipment.driver.name,
            "memory_bytes": plan.memory_bytes,
            "cpus": plan.cpus,
        }
        limits = pod.limits
        return MachineSpec(
            name=pod.name[:40],
            kernel=equipment.files.kernel,
            initrd=equipment.files.initrd,
            disks=disks,
            directory=self._directory,
            memory_bytes=plan.memory_bytes,
            cpus=plan.cpus,
            tsc_khz=equipment.files.tsc_khz,
            dies_with_owner=False,
            nics=(UserNic(facts.mac, self._forwards()),) if networked else (),
            rates=Rates(limits.disk_bytes, limits.disk_operations),
        )

    async def images(self) -> dict[str, Image]:
        """Exports every container's image, again and again until all are there."""
        await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True, mode=0o700)
        pending = {one.name: one for one in (*self._pod.init_containers, *self._pod.containers)}
        back_off = BackOff(1)
        while pending:
            client = await self._host.client()
            wanted = list(pending.values())
            results = await asyncio.gather(
                *(self._export(client, container) for container in wanted), return_exceptions=True
            )
            for container, result in zip(wanted, results, strict=True):
                if isinstance(result, CubecacheError):
                    self._refused(container, words.PULL_ERROR, str(result))
                elif isinstance(result, BaseException):
                    raise result
                else:
                    del pending[container.name]
                    self.handles[container.name] = result
                    status = self._status.container(container.name)
                    if status is not None:
                        status.block_image = result.block_image
                        status.reason, status.message = words.PENDING, ""
            self._on_change()
            if pending:
                delay = back_off.next_delay(0)
                await asyncio.sleep(min(delay, 1.0))  # the error itself is seen for a moment
                for name, container in pending.items():
                    status = self._status.container(name)
                    message = status.message if status else ""
                    self._refused(container, words.PULL_BACK_OFF, message)
                self._on_change()
                await asyncio.sleep(max(delay - 1.0, 0))
        return {name: _image(handle) for name, handle in self.handles.items()}

    async def _export(self, client: Client, container: Container) -> ExportHandle:
        number = self._ids[container.name]
        return await export_image(
            client,
            container,
            platform=self._pod.platform,
            socket=self._directory / f"{root_serial(number)}.sock",
            name=f"pod-{self._status.uid}-{number}",
        )

    def _refused(self, container: Container, reason: str, message: str) -> None:
        status = self._status.container(container.name)
        if status is not None:
            status.reason, status.message = reason, message[: words.MESSAGE_LIMIT]

    async def _provide(self, plan: Plan) -> list[Disk]:
        config = self._directory / "config.img"
        await asyncio.to_thread(_write_private, config, encode_config(plan.config))
        disks: list[Disk] = [FileDisk(SERIAL, config)]
        for name, handle in self.handles.items():
            serial = root_serial(self._ids[name])
            disks.append(NbdDisk(serial, handle.socket, handle.name))
        for wish in plan.disks:
            served = claim_socket(self._host.state, wish.claim) if wish.claim else None
            if served is not None:
                disks.append(VhostUserDisk(wish.serial, served, wish.read_only))
                continue
            path = await asyncio.to_thread(
                provide_disk, self._host.state, self._directory, wish, first=not self._formatted
            )
            disks.append(FileDisk(wish.serial, path, wish.read_only))
        self._formatted = True
        if plan.wants_tools:
            disks.append(FileDisk(TOOLS_SERIAL, await self._host.tools_disk()))
        return disks

    def _facts(self) -> Facts:
        uid = self._status.uid
        mac = "02:" + ":".join(uid.replace("-", "")[at : at + 2] for at in range(0, 10, 2))
        return Facts(
            uid=uid,
            address=USER_ADDRESS,
            host_address=USER_GATEWAY,
            host_name=os.uname().nodename,
            mac=mac,
            gateway=USER_GATEWAY,
            nameserver=USER_NAMESERVER,
        )

    def _lonely(self) -> Facts:
        """Without a network card: the host reaches the pod through its machine's channel only."""
        facts = self._facts()
        return replace(
            facts, address=LOCAL_ADDRESS, host_address="", mac="", gateway="", nameserver=""
        )

    def _forwards(self) -> tuple[Forward, ...]:
        return tuple(
            Forward(port.host_ip, port.host_port, port.container_port, port.protocol.lower())
            for container in self._pod.containers
            for port in container.ports
            if port.host_port
        )


def check_firecracker_pod(pod: Pod) -> None:
    """Raises Unsupported naming what needs a network card, which such pods do not have yet."""
    needs = [
        f"container {container.name}: hostPort {port.host_port}"
        for container in pod.containers
        for port in container.ports
        if port.host_port
    ]
    needs += [
        f"volume {volume.name}"
        for volume in pod.volumes
        if isinstance(volume, NfsVolume | ObjectVolume)
    ]
    if needs:
        raise Unsupported(
            f"{needs[0]} needs a network, and pods on Firecracker have none: it has no user-mode "
            "network",
            remedy="use --driver qemu; port-forward and exec work without a network",
        )


async def _resolved(pod: Pod) -> Pod:
    """The pod with addresses for its NFS servers' names: a guest's kernel knows no names."""
    volumes: list[Volume] = []
    for volume in pod.volumes:
        if isinstance(volume, NfsVolume):
            try:
                async with asyncio.timeout(_RESOLVE_SECONDS):
                    found = await asyncio.get_running_loop().getaddrinfo(
                        volume.server, None, type=socket.SOCK_STREAM, family=socket.AF_INET
                    )
            except (OSError, TimeoutError) as error:
                raise Unavailable(
                    f"volume {volume.name}: the NFS server {volume.server} is not known"
                ) from error
            volumes.append(volume.model_copy(update={"server": found[0][4][0]}))
        else:
            volumes.append(volume)
    return pod.model_copy(update={"volumes": tuple(volumes)})


def _image(handle: ExportHandle) -> Image:
    config = handle.config
    return Image(
        ImageDefaults(
            entrypoint=config.entrypoint,
            command=config.cmd,
            environment=config.env,
            user=config.user,
            working_directory=config.working_dir,
        ),
        handle.face,
    )


def _write_private(path: Path, content: bytes) -> None:
    try:
        path.touch(mode=0o600)
        path.write_bytes(content)
    except OSError as error:
        raise NoSpace(f"the machine's configuration cannot be written: {error}") from error
