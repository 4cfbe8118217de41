"""Device URLs, taken apart; what each part means is the backend's business. Pure."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from backends.errors import DeviceUrlError
from backends.sizes import parse_size

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class DeviceUrl:
    """A device URL in its parts, percent escapes resolved.

    Attributes:
        text: the URL as it was given, for messages.
        scheme: in lower case.
        authority: what stands after ``//``, as given (``host:port``); empty when there is none.
        host: the authority's host, without the brackets of an IPv6 address; None when there is none.
        port: the authority's port; None when there is none.
        path: what follows the authority, with its leading slash.
        parameters: what follows the ``?``, by name.
    """

    text: str
    scheme: str
    authority: str
    host: str | None
    port: int | None
    path: str
    parameters: Mapping[str, str]

    def refusal(self, what: str) -> DeviceUrlError:
        """The error that says what is wrong with this URL, for the caller to raise."""
        return DeviceUrlError(f"device URL {self.text!r} {what}")

    def expect_parameters(self, known: Collection[str]) -> None:
        """Raise DeviceUrlError when there is a parameter that is not ``known``.

        A misspelt one must not pass for an absent one: a typing error in ``size`` or ``cache``
        would show only much later.
        """
        for name in self.parameters:
            if name not in known:
                names = f"it knows {', '.join(known)}" if known else "it takes none"
                raise self.refusal(f"has an unknown parameter {name!r}; {names}")

    def size(self) -> int | None:
        """The parameter ``size`` in bytes; None when it is not given."""
        text = self.parameters.get("size")
        if text is None:
            return None
        try:
            return parse_size(text)
        except ValueError as error:
            raise self.refusal(f"cannot be used: {error}") from None

    def local_path(self, example: str) -> str:
        """The path, of a URL that must name an absolute path of this machine and no host."""
        if self.authority:
            raise self.refusal(
                f"names a host, {self.authority!r}; a local path takes three slashes, {example}"
            )
        if not self.path.startswith("/"):
            raise self.refusal(f"needs an absolute path, such as {example}")
        if self.path.endswith("/"):
            raise self.refusal(f"names a directory; it needs the path of a device, such as {example}")
        return self.path


def split_url(text: str) -> DeviceUrl:
    """Take a device URL apart.

    Raises:
        DeviceUrlError: it is malformed; the message is one line.
    """

    def refusal(what: str) -> DeviceUrlError:
        return DeviceUrlError(f"device URL {text!r} {what}")

    # Before urlsplit, which drops tabs and line ends without a word.
    if _CONTROL.search(text) is not None:
        raise refusal("has a control character in it")
    if _BAD_ESCAPE.search(text) is not None:
        raise refusal("has a % that two hexadecimal digits do not follow; a plain % is written %25")
    try:
        # What came from a command line is not always text.
        text.encode()
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except UnicodeEncodeError:
        raise refusal("is not UTF-8") from None
    except ValueError as error:
        raise refusal(f"is malformed: {error}") from None
    if not parts.scheme:
        raise refusal("has no scheme; it begins with the kind of the device, such as file:///path")
    if "#" in text:
        raise refusal("has a # in it; in a path or a name it is written %23")
    if "@" in parts.netloc:
        raise refusal("has a user name in it, which no kind of device takes")
    try:
        path = unquote(parts.path, errors="strict")
        parameters = _split_parameters(parts.query)
    except UnicodeDecodeError:
        raise refusal("has percent escapes that are not UTF-8") from None
    except ValueError as error:
        raise refusal(str(error)) from None
    if "\0" in path or any("\0" in value for value in parameters.values()):
        raise refusal("has a zero byte in it")
    return DeviceUrl(
        text=text,
        scheme=parts.scheme,
        authority=parts.netloc,
        host=host,
        port=port,
        path=path,
        parameters=MappingProxyType(parameters),
    )


def _split_parameters(query: str) -> dict[str, str]:
    """The parameters of a query. Not ``parse_qsl``: that turns the + of a file name into a space.

    Raises:
        ValueError: one has no value or is given twice; UnicodeDecodeError, which is a ValueError
            too, when one is not UTF-8.
    """
    parameters: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = (unquote(piece, errors="strict") for piece in part.partition("="))
        if not name or not value:
            raise ValueError(f"has a malformed parameter {part!r}; parameters are written name=value")
        if name in parameters:
            raise ValueError(f"gives the parameter {name!r} twice")
        parameters[name] = value
    return parameters
