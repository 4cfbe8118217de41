"""What can go wrong with a device, told apart by type and errno, never by text.

The text is one line for an operator: which device (its URL), what happened, what to do about it.
"""

import errno


class DeviceError(Exception):
    """A device did not do what was asked; the base of every error a backend raises on purpose.

    Attributes:
        error_number: a positive errno, for tables that classify by errno.
    """

    def __init__(self, message: str, *, error_number: int = errno.EIO) -> None:
        super().__init__(message)
        self.error_number = error_number


class DeviceUrlError(DeviceError):
    """A device URL is malformed or has an unknown scheme; nothing was touched."""

    def __init__(self, message: str, *, error_number: int = errno.EINVAL) -> None:
        super().__init__(message, error_number=error_number)


class DeviceUnavailableError(DeviceError):
    """The device cannot be reached or used: missing file, refused connection, wrong kind of node."""

    def __init__(self, message: str, *, error_number: int = errno.ENODEV) -> None:
        super().__init__(message, error_number=error_number)


class DeviceBusyError(DeviceError):
    """Another process holds a range of the device that was asked for."""

    def __init__(self, message: str, *, error_number: int = errno.EBUSY) -> None:
        super().__init__(message, error_number=error_number)
