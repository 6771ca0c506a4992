"""Generic netlink messages of the kernel's nbd family, encoded and taken apart. Pure.

Numbers: linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h; all in the host's byte order.
An attribute is length u16, type u16, payload, padded to 4; a message is length u32, type u16, flags
u16, sequence u32, port u32, then command u8, version u8, two zeros, then attributes.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, error
from typing import Literal

_MESSAGE = Struct("=IHHII")
_GENERIC = Struct("=BBxx")
_ATTRIBUTE = Struct("=HH")
_ERROR = Struct("=i")
_REQUEST, _ACK = 0x1, 0x4
_TYPE_ERROR, _TYPE_DONE = 2, 3
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF

CONTROLLER = 16
_CONTROLLER_GETFAMILY, _CONTROLLER_NAME, _CONTROLLER_ID, _CONTROLLER_GROUPS = 3, 2, 1, 7
_GROUP_NAME, _GROUP_ID = 1, 2
FAMILY = "nbd"
GROUP = "nbd_mc_group"


class NbdCommand(IntEnum):
    """Commands of the nbd family."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class NbdAttribute(IntEnum):
    """Attributes of the nbd family's messages."""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


class NetlinkError(Exception):
    """A message that is malformed, or the kernel's refusal (`errno` is set then)."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.errno = number


@dataclass(frozen=True)
class Message:
    """One message taken apart; `error` is an error message's errno, 0 of an acknowledgement."""

    family: int
    sequence: int
    command: int = 0
    attributes: Mapping[int, bytes] | None = None
    error: int | None = None


@dataclass(frozen=True)
class Family:
    """The nbd family as this kernel numbers it."""

    number: int
    group: int | None


@dataclass(frozen=True)
class DeviceStatus:
    """Of STATUS: one /dev/nbdN."""

    index: int
    connected: bool


def _attribute(kind: int, payload: bytes) -> bytes:
    head = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind)
    return head + payload + bytes(-len(payload) % 4)


def _number(kind: int, value: int, size: int) -> bytes:
    return _attribute(kind, value.to_bytes(size, _order()))


def _order() -> Literal["little", "big"]:
    return sys.byteorder


def encode(family: int, command: int, sequence: int, attributes: bytes) -> bytes:
    """A request that asks for an acknowledgement."""
    body = _GENERIC.pack(command, 1) + attributes
    flags = _REQUEST | _ACK
    return _MESSAGE.pack(_MESSAGE.size + len(body), family, flags, sequence, 0) + body


def encode_find_family(sequence: int) -> bytes:
    """Ask the controller for the nbd family."""
    name = _attribute(_CONTROLLER_NAME, FAMILY.encode() + b"\0")
    return encode(CONTROLLER, _CONTROLLER_GETFAMILY, sequence, name)


def _sockets(fds: Sequence[int]) -> bytes:
    items = b"".join(_attribute(1 | _NESTED, _number(1, fd, 4)) for fd in fds)
    return _attribute(NbdAttribute.SOCKETS | _NESTED, items)


def encode_connect(
    family: int,
    sequence: int,
    *,
    fds: Sequence[int],
    size: int,
    block_size: int,
    server_flags: int,
    identifier: str,
    index: int | None = None,
    timeout_seconds: int = 0,
    dead_seconds: int = 0,
) -> bytes:
    """CONNECT: sizes in bytes; without an index the kernel chooses a free device."""
    attributes = b""
    if index is not None:
        attributes += _number(NbdAttribute.INDEX, index, 4)
    attributes += _number(NbdAttribute.SIZE_BYTES, size, 8)
    attributes += _number(NbdAttribute.BLOCK_SIZE_BYTES, block_size, 8)
    attributes += _number(NbdAttribute.SERVER_FLAGS, server_flags, 8)
    if timeout_seconds:
        attributes += _number(NbdAttribute.TIMEOUT, timeout_seconds, 8)
    if dead_seconds:
        attributes += _number(NbdAttribute.DEAD_CONN_TIMEOUT, dead_seconds, 8)
    name = identifier.encode() + b"\0"
    attributes += _attribute(NbdAttribute.BACKEND_IDENTIFIER, name)
    attributes += _sockets(fds)
    return encode(family, NbdCommand.CONNECT, sequence, attributes)


def encode_reconfigure(
    family: int, sequence: int, *, index: int, fds: Sequence[int], identifier: str
) -> bytes:
    """RECONFIGURE: new sockets in place of dead ones."""
    attributes = _number(NbdAttribute.INDEX, index, 4)
    attributes += _attribute(NbdAttribute.BACKEND_IDENTIFIER, identifier.encode() + b"\0")
    return encode(family, NbdCommand.RECONFIGURE, sequence, attributes + _sockets(fds))


def encode_disconnect(family: int, sequence: int, *, index: int) -> bytes:
    """DISCONNECT."""
    attributes = _number(NbdAttribute.INDEX, index, 4)
    return encode(family, NbdCommand.DISCONNECT, sequence, attributes)


def encode_status(family: int, sequence: int) -> bytes:
    """STATUS of all devices."""
    return encode(family, NbdCommand.STATUS, sequence, b"")


def _attributes(raw: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(raw):
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if not _ATTRIBUTE.size <= length <= len(raw) - at:
            raise NetlinkError("an attribute of impossible length")
        yield kind & _TYPE_MASK, raw[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def decode(raw: bytes) -> Iterator[Message]:
    """The messages of one datagram. Raises NetlinkError when it is malformed."""
    at = 0
    while at < len(raw):
        try:
            length, kind, _flags, sequence, _port = _MESSAGE.unpack_from(raw, at)
            if not _MESSAGE.size <= length <= len(raw) - at:
                raise NetlinkError("a message of impossible length")
            body = raw[at + _MESSAGE.size : at + length]
            if kind == _TYPE_ERROR:
                (number,) = _ERROR.unpack_from(body)
                yield Message(kind, sequence, error=-number)
            elif kind == _TYPE_DONE:
                yield Message(kind, sequence, error=0)
            else:
                command, _version = _GENERIC.unpack_from(body)
                attributes = dict(_attributes(body[_GENERIC.size :]))
                yield Message(kind, sequence, command, attributes)
        except error as failure:
            raise NetlinkError("a message that is cut short") from failure
        at += (length + 3) & ~3


def family_of(message: Message) -> Family:
    """The controller's answer. Raises NetlinkError."""
    attributes = message.attributes or {}
    number = attributes.get(_CONTROLLER_ID)
    if number is None:
        raise NetlinkError("the kernel does not tell the nbd family's number")
    group = None
    for _kind, item in _attributes(attributes.get(_CONTROLLER_GROUPS, b"")):
        entry = dict(_attributes(item))
        name = entry.get(_GROUP_NAME, b"").rstrip(b"\0").decode("ascii", "replace")
        if name == GROUP and _GROUP_ID in entry:
            group = int.from_bytes(entry[_GROUP_ID], _order())
    return Family(int.from_bytes(number, _order()), group)


def index_of(message: Message) -> int:
    """The device index that a CONNECT answer or a LINK_DEAD names. Raises NetlinkError."""
    raw = (message.attributes or {}).get(NbdAttribute.INDEX)
    if raw is None or len(raw) != 4:
        raise NetlinkError("the kernel names no device")
    return int.from_bytes(raw, _order())


def statuses_of(message: Message) -> list[DeviceStatus]:
    """The devices of a STATUS answer."""
    found = []
    for _kind, item in _attributes((message.attributes or {}).get(NbdAttribute.DEVICE_LIST, b"")):
        entry = dict(_attributes(item))
        index = int.from_bytes(entry.get(1, b""), _order())
        found.append(DeviceStatus(index, entry.get(2, b"\0") != b"\0"))
    return found


def describe(number: int) -> str:
    """An errno in words."""
    return os.strerror(number)
