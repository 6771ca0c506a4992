"""fallocate(2) with its flags, which the standard library does not offer."""

import ctypes
import os

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def fallocate_zero(fd: int, offset: int, length: int, *, punch: bool) -> None:
    """Make a range of a file read as zeros: a hole, or (not `punch`) allocated zeros.

    Raises OSError; EOPNOTSUPP where the file system cannot.
    """
    flags = _KEEP_SIZE | (_PUNCH_HOLE if punch else _ZERO_RANGE)
    if _libc.fallocate(fd, flags, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
