"""The one place where errno values become the protocol's error values, at the last hop."""

import errno

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
ENOTSUP = 95
ESHUTDOWN = 108

_WIRE = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EINVAL,
    errno.EOPNOTSUPP: EINVAL,
    errno.ESHUTDOWN: ESHUTDOWN,
}


def wire_error(number: int, *, fast_zero: bool = False) -> int:
    """The protocol's error value for an errno; whatever it has no word for is EIO.

    ENOTSUP is kept for what the document keeps it for: a fast zero that would not be fast.
    """
    if fast_zero and number == errno.EOPNOTSUPP:
        return ENOTSUP
    return _WIRE.get(number, EIO)


class ProtocolViolation(Exception):
    """The peer broke a MUST in a way that only closing the connection answers."""
