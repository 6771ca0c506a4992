"""Which devices a client may name: the Exports protocol and its plainest implementation."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from nbdserver.device import Device


class UnknownExport(Exception):
    """No such export here. Clients are told the same whether it exists elsewhere or nowhere."""


class Exports(Protocol):
    """One socket's view of the devices. It owns them: the server never closes a device."""

    def names(self) -> Sequence[str] | None:
        """Names to list, or None where listing is not allowed."""
        ...

    async def open(self, name: str) -> Device:
        """The device behind a name (the empty name asks for the default); UnknownExport."""
        ...

    async def leave(self, name: str, device: Device) -> None:
        """A client that had opened the device is gone; called once for each `open`."""
        ...


class StaticExports:
    """A fixed mapping of names to devices; one device alone is the default export too."""

    def __init__(
        self, devices: Mapping[str, Device], *, default: str | None = None, listed: bool = True
    ) -> None:
        self._devices = dict(devices)
        if default is None and len(self._devices) == 1:
            default = next(iter(self._devices))
        self._default = default
        self._listed = listed

    def names(self) -> Sequence[str] | None:
        """All names, sorted."""
        return sorted(self._devices) if self._listed else None

    async def open(self, name: str) -> Device:
        """The device of that name."""
        if name == "" and "" not in self._devices and self._default is not None:
            name = self._default
        device = self._devices.get(name)
        if device is None:
            raise UnknownExport(name)
        return device

    async def leave(self, name: str, device: Device) -> None:
        """The mapping keeps its devices."""

    async def close(self) -> None:
        """Close every device."""
        for device in self._devices.values():
            await device.close()
