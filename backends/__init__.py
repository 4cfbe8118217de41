"""What a device can be: one module for each kind, chosen by the scheme of the device URL.

::

    file:///path?size=50M[&cache=direct|buffered]    backends.file
    block:///dev/disk/by-id/...                      backends.block
    nbd://host[:port]/export                         backends.nbd
    nbd+unix:///export?socket=/path                  backends.nbd
    memory:NAME?size=50M                             backends.memory    (tests)

``parse_device_url`` understands a URL, ``open_device`` opens what it names; ``base`` has what every
device offers. This package knows nothing of domains and groups and never imports ``proxy``.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType

from backends.base import DataPath, DeviceInfo, Location, OpenDevice
from backends.errors import DeviceBusyError, DeviceError, DeviceUnavailableError, DeviceUrlError
from backends.url import DeviceUrl, split_url

__all__ = [
    "SCHEMES",
    "DataPath",
    "DeviceBusyError",
    "DeviceError",
    "DeviceInfo",
    "DeviceUnavailableError",
    "DeviceUrlError",
    "Location",
    "OpenDevice",
    "open_device",
    "parse_device_url",
]

#: URL scheme to the module whose ``parse`` understands it. By name, so that a backend is loaded
#: when a URL first asks for it: pure modules import this package's leaves (sizes, errors), and
#: neither they nor the command line have a use for sockets and threads.
SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "block": "backends.block",
        "file": "backends.file",
        "memory": "backends.memory",
        "nbd": "backends.nbd",
        "nbd+unix": "backends.nbd",
    }
)


def parse_device_url(url: str) -> Location:
    """The location a device URL names; nothing is touched.

    Raises:
        DeviceUrlError: it is malformed or its scheme is unknown; the message is one line.
    """
    parts = split_url(url)
    if parts.scheme not in SCHEMES:
        raise parts.refusal(f"has an unknown scheme {parts.scheme!r}; known are {', '.join(SCHEMES)}")
    parse: Callable[[DeviceUrl], Location] = import_module(SCHEMES[parts.scheme]).parse
    return parse(parts)


async def open_device(url: str, *, create: bool = False) -> OpenDevice:
    """Open the device a URL names, for reading and writing.

    Args:
        url: the device URL.
        create: make the device when it is absent, if its kind can be made and the URL gives a size.

    Raises:
        DeviceUrlError: the URL is malformed or its scheme is unknown.
        DeviceUnavailableError: the device is missing, out of reach, of another kind, or too small.
        DeviceError: it was reached and misbehaved.
    """
    return await parse_device_url(url).open(create=create)
