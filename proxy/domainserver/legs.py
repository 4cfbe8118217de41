"""Opening a leg: connect every device, make sure it is the right one, lock the domain's part, hand it over."""

from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from errno import ETIMEDOUT
from typing import Any

import trio

from backends import DataPath, DeviceError, OpenDevice, open_device
from proxy.engine import DeviceKind, DeviceSpec
from proxy.errors import LabelError
from proxy.label import LABEL_SIZE, Label, LabelNewerError, LabelStaleError, check_label

#: How long a predecessor's last writes may take to land before its locks are gone.
LOCK_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class DeviceOrder:
    """A device to open: the label to put on it, and the domain's (offset, length) ranges on it."""

    url: str
    label: Label
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "DeviceOrder":
        """The order in a message of the control channel."""
        url = message["url"]
        label = Label.decode(b64decode(message["label"]), url=url)
        return cls(url, label, tuple((offset, length) for offset, length in message["ranges"]))


class LegError(Exception):
    """A leg could not be opened; ``position`` is the device it failed on.

    ``is_newer``: by its label the store is an old one, and whatever it says may be wrong.
    """

    def __init__(self, message: str, *, position: int, error_number: int, is_newer: bool = False) -> None:
        super().__init__(message)
        self.is_newer = is_newer
        self.position = position
        self.error_number = error_number


@dataclass(frozen=True, slots=True)
class Generations:
    """Of the labels that may be found: at least ``least``, unless stale ones are welcome, and at most ``most``."""

    least: int
    most: int
    stale_welcome: bool


async def open_leg(
    orders: Sequence[DeviceOrder],
    generations: Generations,
    *,
    distrust: Callable[[], Awaitable[None]],
    timeout_s: float,
    open_device: Callable[[str], Awaitable[OpenDevice]] = open_device,
) -> tuple[list[DeviceSpec], list[str]]:
    """Open all devices of a leg, and label them anew.

    Args:
        orders: its devices, by position.
        generations: of the labels they may have.
        distrust: called when some are stale and before they are labelled; once it has returned, that all
            of the leg is to be copied is not forgotten any more.
        timeout_s: for each device to be reached and to give its label. (A predecessor's lock is waited for
            longer: that wait ends with the predecessor.)
        open_device: gives the device of a URL.

    Returns:
        The devices, whose descriptors are the caller's, and what was found stale, a line each.

    Raises:
        LegError: one cannot be opened, is not the one its label should say, or is locked by
            another process. None is left open.
    """
    async with AsyncExitStack() as opened:
        devices: list[OpenDevice] = []
        stale: list[str] = []
        for position, order in enumerate(orders):
            with _blamed(order.url, position, timeout_s):
                with trio.fail_after(timeout_s):
                    device = await opened.enter_async_context(await open_device(order.url))
                    stale += await _check(device, order, generations)
                await device.lock(order.ranges, timeout_s=LOCK_TIMEOUT_S)
            devices.append(device)
        if stale:
            await distrust()
        for position, (device, order) in enumerate(zip(devices, orders, strict=True)):
            with _blamed(order.url, position, timeout_s), trio.fail_after(timeout_s):
                await _write(device, order.label)
        return [_spec(device) for device in devices], stale


async def label_leg(
    orders: Sequence[DeviceOrder],
    generations: Generations,
    *,
    timeout_s: float,
    open_device: Callable[[str], Awaitable[OpenDevice]] = open_device,
) -> None:
    """Label the devices of a leg anew, each over a connection of its own; the leg may be in use.

    Raises:
        LegError: one cannot be reached, or is not the one its label should say; those before it are labelled.
    """
    for position, order in enumerate(orders):
        with _blamed(order.url, position, timeout_s), trio.fail_after(timeout_s):
            async with await open_device(order.url) as device:
                await _check(device, order, generations)
                await _write(device, order.label)


async def _check(device: OpenDevice, order: DeviceOrder, generations: Generations) -> list[str]:
    """Make sure that a device is the one that is meant; a line when it is, and is stale, and that is welcome."""
    found = Label.decode(await device.read(0, LABEL_SIZE), url=order.url)
    expected = replace(order.label, map_generation=generations.most)
    try:
        check_label(found, expected, least_generation=generations.least, url=order.url, size=device.info.size)
    except LabelStaleError as error:
        if not generations.stale_welcome:
            raise
        return [str(error)]
    return []


async def _write(device: OpenDevice, label: Label) -> None:
    await device.write(0, label.encode())
    await device.flush()


@contextmanager
def _blamed(url: str, position: int, timeout_s: float) -> Iterator[None]:
    """Turn what goes wrong with one device into a LegError that names it."""
    try:
        yield
    except DeviceError as error:
        raise LegError(str(error), position=position, error_number=error.error_number) from error
    except trio.TooSlowError:
        text = f"{url}: did not answer within {timeout_s:g} s; check its server and the network"
        raise LegError(text, position=position, error_number=ETIMEDOUT) from None
    except LabelError as error:
        is_newer = isinstance(error, LabelNewerError)
        raise LegError(str(error), position=position, error_number=0, is_newer=is_newer) from error


def _spec(device: OpenDevice) -> DeviceSpec:
    info = device.info
    return DeviceSpec(
        fd=device.detach(),
        kind=DeviceKind.NBD if info.path is DataPath.NBD else DeviceKind.FILE,
        block_size=info.block_size,
        transfer_max=info.transfer_max,
        in_memory=info.in_memory,
        can_flush=info.can_flush,
        can_fua=info.can_fua,
        can_zero=info.can_zero,
    )
