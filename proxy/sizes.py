"""Sizes as people write them: ``50M``, ``1.5G``, ``4096``. Units are powers of 1024.

Pure. The parser is the one device URLs are read with, so that a size means the same everywhere;
``format_size`` is what every message and table shows.
"""

from backends import sizes
from backends.sizes import GIB, KIB, MIB, SIZE_MAX, TIB, format_size
from proxy.errors import InvalidError

__all__ = ["GIB", "KIB", "MIB", "SIZE_MAX", "TIB", "format_size", "parse_size"]


def parse_size(text: str) -> int:
    """Bytes meant by ``text``.

    Raises:
        InvalidError: it is not a number with an optional K, M, G or T, is not a whole number of
            bytes, is zero, or does not fit a signed 64-bit offset.
    """
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise InvalidError(str(error)) from None
