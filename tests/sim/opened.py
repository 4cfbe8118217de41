"""Simulated devices on the control path: what the shipping code that opens legs finds at a URL."""

import errno
from collections.abc import Callable, Sequence

import trio

from backends import DataPath, DeviceBusyError, DeviceError, DeviceInfo, DeviceUnavailableError, OpenDevice
from tests.sim.agenda import MILLISECOND_NS
from tests.sim.devices import Device
from tests.sim.rig import new_descriptor

#: How often whoever waits for a device looks again.
_LOOK_S = 0.003


class OpenedDevice(OpenDevice):
    """A simulated device, open.

    Args:
        taken: called with the descriptor when it is detached.
    """

    def __init__(self, url: str, device: Device, taken: Callable[[int, Device], None]) -> None:
        super().__init__(
            url,
            DeviceInfo(
                size=len(device.medium.content),
                block_size=device.block_size,
                transfer_max=device.transfer_max,
                path=DataPath.NBD if device.remote else DataPath.FILE,
                in_memory=False,
                can_flush=device.can_flush,
                can_fua=device.can_fua,
                can_zero=device.can_zero,
                can_trim=False,
                rotational=False,
            ),
        )
        self._device = device
        self._taken = taken
        self._lock: object = None

    async def flush(self) -> None:
        """See ``OpenDevice.flush``."""
        await reach(self.url, self._device)
        self._device.medium.persist(self._device.medium.flush_begin())

    async def lock(self, ranges: Sequence[tuple[int, int]], *, timeout_s: float) -> None:
        """See ``OpenDevice.lock``: of a file, until nothing of a predecessor can land any more."""
        await trio.lowlevel.checkpoint()
        if self._device.remote:
            return
        with trio.move_on_after(timeout_s):
            while self._device.is_locked:
                await trio.sleep(_LOOK_S)
            self._device.lock = self._lock = object()
            return
        raise DeviceBusyError(f"{self.url}: is locked by another process")

    def detach(self) -> int:
        """See ``OpenDevice.detach``."""
        descriptor = new_descriptor()
        self._taken(descriptor, self._device)
        self._lock = None
        return descriptor

    async def aclose(self) -> None:
        """See ``OpenDevice.aclose``."""
        if self._lock is not None and self._device.lock is self._lock:
            self._device.lock = None

    async def _read_blocks(self, offset: int, length: int) -> bytes:
        await reach(self.url, self._device)
        return self._device.medium.read(offset, length)

    async def _write_blocks(self, offset: int, data: bytes) -> None:
        await reach(self.url, self._device)
        self._device.medium.write(offset, data, durable=not self._device.can_flush)


async def reach(url: str, device: Device) -> None:
    """Return when the device has answered. Raises DeviceError when it is down."""
    agenda = device.agenda
    await trio.sleep(agenda.random.randrange(MILLISECOND_NS) / 1e9)
    while device.is_stalled:
        await trio.sleep(_LOOK_S)
    if not device.is_up:
        if agenda.chance(0.5):
            raise DeviceError(f"{url}: does not answer", error_number=errno.EIO)
        raise DeviceUnavailableError(f"{url}: cannot be reached", error_number=errno.ECONNREFUSED)
