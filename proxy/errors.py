"""The error taxonomy, and the one table from errno to what a client of the NBD door is told.

Errors are told apart by type and errno, never by their text. The text is for a person: what
happened, to which domain or device, and what to do about it.
"""

import errno
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class StandfastError(Exception):
    """Base of every error this project raises on purpose; its text is one clear line."""


class RefusedError(StandfastError):
    """The request is understood and cannot be carried out as things stand; nothing was changed."""


class InvalidError(RefusedError):
    """The request itself is malformed: a size that does not parse, a name with odd characters."""


class NotFoundError(RefusedError):
    """The named group, device, domain or disk does not exist."""


class LabelError(RefusedError):
    """A device's label is missing, damaged, or not the one expected there."""


class StoreError(StandfastError):
    """The store could not be read or a change could not be made durable."""


class StoreOutdatedError(StoreError):
    """Something is newer than the store: it was brought back from a backup, and may be wrong in everything."""


class NbdError(IntEnum):
    """The eight error values of the protocol. Source: NBD proto.md, "Error values"."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


#: errno of a device to the error a client is told; whatever is not named here is EIO, so that no
#: client sees a value the protocol does not define.
NBD_ERROR_BY_ERRNO: Mapping[int, NbdError] = MappingProxyType(
    {
        errno.EPERM: NbdError.EPERM,
        errno.EACCES: NbdError.EPERM,
        errno.EROFS: NbdError.EPERM,
        errno.ENOMEM: NbdError.ENOMEM,
        errno.EINVAL: NbdError.EINVAL,
        errno.ENOSPC: NbdError.ENOSPC,
        errno.EDQUOT: NbdError.ENOSPC,
        errno.EFBIG: NbdError.ENOSPC,
        errno.EOVERFLOW: NbdError.EOVERFLOW,
        errno.EOPNOTSUPP: NbdError.ENOTSUP,
        errno.ESHUTDOWN: NbdError.ESHUTDOWN,
    }
)


def nbd_error_of(error_number: int) -> NbdError:
    """What a client is told when a device answered ``error_number`` (a positive errno)."""
    return NBD_ERROR_BY_ERRNO.get(error_number, NbdError.EIO)
