"""The control path of devices that are a descriptor with offsets: files, block devices, memory."""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence

import trio

from backends.base import DeviceInfo, OpenDevice
from backends.errors import DeviceBusyError, DeviceError

#: How often a held lock is asked for again. The kernel tells no poller that a lock is free, and the
#: call that waits for it cannot be cancelled; a take-over after a crash may well wait this long.
LOCK_POLL_INTERVAL_S = 0.02

#: struct flock: l_type, l_whence, l_start, l_len, l_pid, which must be 0 here. Source: fcntl(2).
_FLOCK = struct.Struct("@hhqqi4x")


class DescriptorDevice(OpenDevice):
    """An open device whose descriptor is read and written by offset.

    Owns the descriptor until ``detach``. Blocking calls run in worker threads; a call under way is
    not abandoned when its task is cancelled, since a late write must not go unseen.
    """

    def __init__(self, url: str, descriptor: int, info: DeviceInfo, *, local_path: str | None) -> None:
        super().__init__(url, info, local_path=local_path)
        self._descriptor: int | None = descriptor

    async def flush(self) -> None:
        """See ``OpenDevice.flush``."""
        descriptor = self._use()
        try:
            await trio.to_thread.run_sync(os.fdatasync, descriptor)
        except OSError as error:
            raise self._failed("flushing", error) from error

    async def lock(self, ranges: Sequence[tuple[int, int]], *, timeout_s: float) -> None:
        """See ``OpenDevice.lock``: exclusive open-file-description locks. Source: fcntl(2), F_OFD_SETLK.

        Such a lock lives until the last reference to the description is gone, and every request
        in flight in the kernel, those of io_uring included, holds one. A process's death therefore
        frees its locks only when its last write has landed or failed: whoever gets the lock next
        knows that no late write of a dead predecessor can still arrive. A classic POSIX lock would
        be freed when the descriptor closes, with writes still under way.

        It is advisory: it holds off this software, not other programs. On a block device it belongs
        to the device node, so all must use nodes of one /dev.
        """
        descriptor = self._use()
        deadline = trio.current_time() + timeout_s
        locked: list[tuple[int, int]] = []
        try:
            # In order of offset, so that two who ask for overlapping sets never wait for each other.
            for wanted in sorted(ranges):
                while not await trio.to_thread.run_sync(self._try_lock, descriptor, wanted):
                    if trio.current_time() >= deadline:
                        raise self._busy(wanted, timeout_s)
                    await trio.sleep(LOCK_POLL_INTERVAL_S)
                locked.append(wanted)
        except BaseException:
            for held in locked:
                self._set_lock(descriptor, fcntl.F_UNLCK, held)
            raise

    def detach(self) -> int:
        """See ``OpenDevice.detach``."""
        descriptor, self._descriptor = self._use(), None
        return descriptor

    async def aclose(self) -> None:
        """See ``OpenDevice.aclose``."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, descriptor)

    def _use(self) -> int:
        if self._descriptor is None:
            raise trio.ClosedResourceError(f"{self.url} is closed or detached")
        return self._descriptor

    async def _read_blocks(self, offset: int, length: int) -> bytes:
        return await trio.to_thread.run_sync(self._pread, self._use(), offset, length)

    async def _write_blocks(self, offset: int, data: bytes) -> None:
        await trio.to_thread.run_sync(self._pwrite, self._use(), offset, data)

    def _pread(self, descriptor: int, offset: int, length: int) -> bytes:
        what = f"reading {length} bytes at offset {offset}"
        # One byte more than nothing, since there is no empty mapping; a mapping, since it is
        # aligned to pages, which O_DIRECT asks of memory.
        with mmap.mmap(-1, max(length, 1)) as buffer:
            done = 0
            while done < length:
                with memoryview(buffer)[done:length] as rest:
                    try:
                        count = os.preadv(descriptor, [rest], offset + done)
                    except OSError as error:
                        raise self._failed(what, error) from error
                if count == 0:
                    raise DeviceError(f"{self.url}: {what} met its end: it has shrunk since it was opened")
                done += count
            return buffer[:length]

    def _pwrite(self, descriptor: int, offset: int, data: bytes) -> None:
        with mmap.mmap(-1, max(len(data), 1)) as buffer:
            buffer[: len(data)] = data
            done = 0
            while done < len(data):
                with memoryview(buffer)[done : len(data)] as rest:
                    try:
                        done += os.pwritev(descriptor, [rest], offset + done)
                    except OSError as error:
                        raise self._failed(f"writing {len(data)} bytes at offset {offset}", error) from error

    def _try_lock(self, descriptor: int, wanted: tuple[int, int]) -> bool:
        try:
            self._set_lock(descriptor, fcntl.F_WRLCK, wanted)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise self._failed("locking", error) from error
        return True

    @staticmethod
    def _set_lock(descriptor: int, kind: int, wanted: tuple[int, int]) -> None:
        offset, length = wanted
        assert length > 0, "a length of 0 would mean: to the end, however far that moves"
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, length, 0))

    def _busy(self, wanted: tuple[int, int], timeout_s: float) -> DeviceBusyError:
        offset, length = wanted
        return DeviceBusyError(
            f"{self.url}: {length} bytes at offset {offset} are locked by another process, and still were "
            f"after {timeout_s:g} s; stop the domain server or other program that uses them"
        )

    def _failed(self, what: str, error: OSError) -> DeviceError:
        return DeviceError(
            f"{self.url}: {what} failed: {error.strerror}", error_number=error.errno or errno.EIO
        )
