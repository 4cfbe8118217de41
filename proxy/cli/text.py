"""Text for people. Pure."""


def printable(text: str) -> str:
    """``text`` with whatever a terminal might obey written as an escape; line ends become spaces."""
    words = " ".join(text.split())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in words)


def count(number: int, noun: str) -> str:
    """``1 device``, ``2 devices``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
