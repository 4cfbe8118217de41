"""Sizes as people write them: ``50M``, ``1.5G``, ``4096``. Units are powers of 1024. Pure.

They live here because a device URL carries one (``?size=50M``); the command line's sizes are the
same ones.
"""

import re
from fractions import Fraction

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: NBD carries offsets as unsigned 64 bit, the kernel's loff_t is signed: the smaller one binds.
SIZE_MAX = (1 << 63) - 1

_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by ``text``.

    Raises:
        ValueError: it is not a number with an optional K, M, G or T, is not a whole number of
            bytes, is zero, or does not fit a signed 64-bit offset. Its text is one clear line.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"size {text!r} is not a number of bytes with an optional K, M, G or T, such as 50M")
    size = Fraction(match["number"]) * _UNITS[match["unit"].upper()]
    if size.denominator != 1:
        raise ValueError(f"size {text!r} is not a whole number of bytes")
    if size <= 0:
        raise ValueError(f"size {text!r} must be larger than zero")
    if size > SIZE_MAX:
        raise ValueError(f"size {text!r} is larger than the {format_size(SIZE_MAX)} a device can have")
    return int(size)


def format_size(size: int) -> str:
    """``size`` bytes for a person: exact where a unit divides it, else two digits, ``149.94M``."""
    for unit in ("T", "G", "M", "K"):
        scale = _UNITS[unit]
        if size >= scale:
            whole, rest = divmod(size, scale)
            return f"{whole}{unit}" if rest == 0 else f"{size / scale:.2f}{unit}"
    return str(size)
