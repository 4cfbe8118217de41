"""The NBD protocol's numbers and layouts, for both ends: no behaviour but a check of block sizes.

Names are the protocol's own without their ``NBD_`` prefixes; all integers are big-endian.

Source: NBD proto.md, "Protocol phases" for the layouts, "Values" for the numbers.
"""

from enum import IntEnum, IntFlag
from struct import Struct

#: ASCII ``NBDMAGIC``: how every server begins.
NBD_MAGIC = 0x4E42444D41474943

#: ASCII ``IHAVEOPT``: after ``NBD_MAGIC`` the mark of newstyle, and the beginning of every option.
OPTION_MAGIC = 0x49484156454F5054

#: What an oldstyle server sends where a newstyle one sends ``OPTION_MAGIC``.
OLDSTYLE_MAGIC = 0x00420281861253

OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

#: The longest export name, description or error text. Source: NBD proto.md, "Conventions".
STRING_BYTES_MAX = 4096

#: What follows the answer to ``EXPORT_NAME`` unless ``NO_ZEROES`` was negotiated.
ZEROES_LENGTH = 124

#: Size constraints of an export that does not advertise any, and the most that may be advertised
#: as its minimum. Source: NBD proto.md, "Size constraints".
BLOCK_SIZE_MIN_DEFAULT = 1
BLOCK_SIZE_PREFERRED_DEFAULT = 4096
PAYLOAD_DEFAULT_MAX = 32 * 1024 * 1024
BLOCK_SIZE_MIN_MAX = 64 * 1024

#: magic, style magic, ``HandshakeFlag``
GREETING = Struct(">QQH")
#: ``ClientFlag``
CLIENT_FLAGS = Struct(">I")
#: magic, ``Option``, length of the data that follows
OPTION_HEADER = Struct(">QII")
#: magic, ``Option`` answered, ``ReplyType``, length of the data that follows
OPTION_REPLY_HEADER = Struct(">QIII")
#: size in bytes, ``TransmissionFlag``: the answer to ``EXPORT_NAME``, and the rest of ``INFO_EXPORT``
EXPORT = Struct(">QH")
#: minimum block size, preferred block size, maximum payload: the rest of ``Info.BLOCK_SIZE``
BLOCK_SIZE = Struct(">III")
#: length of the string that follows
STRING_LENGTH = Struct(">I")
#: ``Info``, or how many of them follow
INFO = Struct(">H")
#: magic, ``CommandFlag``, ``Command``, cookie, offset, length
REQUEST = Struct(">IHHQQI")
#: magic, error, cookie
SIMPLE_REPLY = Struct(">IIQ")


class HandshakeFlag(IntFlag):
    """What a server offers in its greeting (16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What a client takes of ``HandshakeFlag``, bit for bit (32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """What a client asks during negotiation."""

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


class ReplyType(IntEnum):
    """What a server answers to an option; errors have ``REPLY_ERROR_BIT`` set."""

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


REPLY_ERROR_BIT = 1 << 31


class Info(IntEnum):
    """What can be asked and told about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """What a client asks during transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """How a command is to be carried out (16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


def block_size_fault(minimum: int, preferred: int, payload_max: int) -> str | None:
    """What is wrong with an export's size constraints (bytes), in words; ``None`` when nothing is.

    A preferred size below 512 is let pass: the protocol forbids it, and nothing breaks by it.

    Source: NBD proto.md, "Size constraints".
    """
    if not _is_power_of_two(minimum) or minimum > BLOCK_SIZE_MIN_MAX:
        return f"minimum block size {minimum} is not a power of two up to {BLOCK_SIZE_MIN_MAX}"
    if not _is_power_of_two(preferred) or preferred < minimum:
        return f"preferred block size {preferred} is not a power of two from the minimum {minimum} up"
    if payload_max < preferred:
        return f"maximum payload {payload_max} is smaller than the preferred block size {preferred}"
    return None


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
