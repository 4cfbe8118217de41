"""Opening a leg: connect every device, make sure it is the right one, lock the domain's part, hand it over."""

from base64 import b64decode
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from errno import ETIMEDOUT
from typing import Any

import trio

from backends import DataPath, DeviceError, OpenDevice, open_device
from proxy.engine import DeviceKind, DeviceSpec
from proxy.errors import LabelError
from proxy.label import LABEL_SIZE, Label, check_label

#: How long a predecessor's last writes may take to land before its locks are gone.
LOCK_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class DeviceOrder:
    """A device to open: what its label must say, and the domain's (offset, length) ranges on it."""

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
    """A leg could not be opened; ``position`` is the device it failed on."""

    def __init__(self, message: str, *, position: int, error_number: int) -> None:
        super().__init__(message)
        self.position = position
        self.error_number = error_number


async def open_leg(orders: Sequence[DeviceOrder], *, timeout_s: float) -> list[DeviceSpec]:
    """Open all devices of a leg; the caller owns the descriptors in the answer.

    Args:
        orders: its devices, by position.
        timeout_s: for each device to be reached and to give its label. (A predecessor's lock is waited for
            longer: that wait ends with the predecessor.)

    Raises:
        LegError: one cannot be opened, is not the one its label should say, or is locked by
            another process. None is left open.
    """
    async with AsyncExitStack() as opened:
        devices: list[OpenDevice] = []
        for position, order in enumerate(orders):
            try:
                with trio.fail_after(timeout_s):
                    device = await opened.enter_async_context(await open_device(order.url))
                    found = Label.decode(await device.read(0, LABEL_SIZE), url=order.url)
                check_label(found, order.label, url=order.url, size=device.info.size)
                await device.lock(order.ranges, timeout_s=LOCK_TIMEOUT_S)
            except DeviceError as error:
                raise LegError(str(error), position=position, error_number=error.error_number) from error
            except trio.TooSlowError:
                text = f"{order.url}: did not answer within {timeout_s:g} s; check its server and the network"
                raise LegError(text, position=position, error_number=ETIMEDOUT) from None
            except LabelError as error:
                raise LegError(str(error), position=position, error_number=0) from error
            devices.append(device)
        return [_spec(device) for device in devices]


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
