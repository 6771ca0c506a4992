"""Requests that are no reads, done by a device and answered with one encoded reply."""

import errno

from nbdserver.device import Buffer, Device, DeviceError
from nbdserver.protocol.constants import Command, CommandFlag
from nbdserver.protocol.replies import clip_extents, encode_done, encode_extents
from nbdserver.protocol.requests import Request, block_status_payload
from nbdserver.protocol.session import Session


async def run_command(
    device: Device, session: Session, request: Request, payload: Buffer, *, max_extents: int
) -> bytes:
    """Do a validated request; the encoded reply. Raises DeviceError."""
    offset, length = request.offset, request.length
    fua = bool(request.flags & CommandFlag.FUA)
    command = request.command
    if command == Command.WRITE:
        await device.write(offset + request.done, payload, fua=fua)
    elif command == Command.FLUSH:
        await device.flush()
    elif command == Command.TRIM:
        await device.trim(offset, length, fua=fua)
    elif command == Command.WRITE_ZEROES:
        no_hole = bool(request.flags & CommandFlag.NO_HOLE)
        fast = bool(request.flags & CommandFlag.FAST_ZERO)
        await device.write_zeroes(offset, length, fua=fua, no_hole=no_hole, fast=fast)
    elif command == Command.CACHE:
        await device.cache(offset, length)
    else:
        return await _block_status(device, session, request, payload, max_extents=max_extents)
    return encode_done(session.mode, request.cookie, offset)


async def _block_status(
    device: Device, session: Session, request: Request, payload: Buffer, *, max_extents: int
) -> bytes:
    length, contexts = request.length, session.contexts
    if request.payload:
        asked = block_status_payload(request, bytes(payload), session)
        if asked is None:
            raise DeviceError(errno.EINVAL, "malformed block status payload")
        length, contexts = asked
    one = bool(request.flags & CommandFlag.REQ_ONE)
    statuses = []
    for number, name in contexts:
        extents = await device.extents(name, request.offset, length, one=one)
        clipped = clip_extents(extents, length, one=one, limit=max_extents, mode=session.mode)
        statuses.append((number, clipped))
    return encode_extents(session.mode, request.cookie, request.offset, statuses)
