"""Magic numbers, flags, options, reply types and commands of the NBD protocol document.

Flags are plain integers: an IntFlag costs a microsecond per test, and requests take several.
"""

from enum import IntEnum
from typing import Final

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

MAX_STRING = 4096
MAX_EXTENTS = 1 << 20


class HandshakeFlag:
    """Sent by the server after its magic, 16 bits; the client answers with the same bits."""

    FIXED_NEWSTYLE: Final = 1 << 0
    NO_ZEROES: Final = 1 << 1


class ExportFlag:
    """Transmission flags, 16 bits."""

    HAS_FLAGS: Final = 1 << 0
    READ_ONLY: Final = 1 << 1
    SEND_FLUSH: Final = 1 << 2
    SEND_FUA: Final = 1 << 3
    ROTATIONAL: Final = 1 << 4
    SEND_TRIM: Final = 1 << 5
    SEND_WRITE_ZEROES: Final = 1 << 6
    SEND_DF: Final = 1 << 7
    CAN_MULTI_CONN: Final = 1 << 8
    SEND_RESIZE: Final = 1 << 9
    SEND_CACHE: Final = 1 << 10
    SEND_FAST_ZERO: Final = 1 << 11
    BLOCK_STATUS_PAYLOAD: Final = 1 << 12


class Option(IntEnum):
    """What a client may ask for during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """Types of the server's answers to options; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """Information items of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Request types of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag:
    """Flags of a request, 16 bits."""

    FUA: Final = 1 << 0
    NO_HOLE: Final = 1 << 1
    DF: Final = 1 << 2
    REQ_ONE: Final = 1 << 3
    FAST_ZERO: Final = 1 << 4
    PAYLOAD_LEN: Final = 1 << 5


class Chunk(IntEnum):
    """Types of structured and extended reply chunks; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_DONE = 1


class ReplyMode(IntEnum):
    """How replies (and, when EXTENDED, requests) are framed; negotiated in the handshake."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


STATE_HOLE = 1
STATE_ZERO = 2
BASE_ALLOCATION = "base:allocation"
