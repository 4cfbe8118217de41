"""The manager as it ships, with a trap around every persisted step: ``manager.py TRAP serve …``.

While the file ``TRAP`` exists, steps are counted from 1 and told in ``TRAP.log``. Its text says where to die:
``NUMBER before|after commits|all``, or number 0 not to.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from backends.base import OpenDevice
from proxy.cli.main import main
from proxy.manager import daemon
from proxy.manager.link import Link
from proxy.store import sqlite

#: These change nothing.
_QUESTIONS = frozenset({"hello", "status"})


class Trap:
    """Counts steps, and ends the process at one of them.

    Args:
        path: of the file that sets it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = path.with_name(f"{path.name}.log")
        self._set = ""
        self._count = 0

    @contextmanager
    def step(self, name: str, *, is_persisted: bool = True) -> Iterator[None]:
        """What is done inside is one step."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            text = ""
        if text != self._set:
            self._set, self._count = text, 0
        if not text or not (is_persisted or text.endswith("all")):
            yield
            return
        self._count += 1
        place = text.rpartition(" ")[0]
        number = self._count
        with self._log.open("a") as log:
            log.write(f"{name}\n")
        if place == f"{number} before":
            os.kill(os.getpid(), signal.SIGKILL)
        yield
        if place == f"{number} after":
            os.kill(os.getpid(), signal.SIGKILL)


def lay(trap: Trap) -> None:
    """Put the trap around commits, writes to devices, and commands to domain servers."""

    class TrappedStore(sqlite.SqliteStore):
        @contextmanager
        def _transaction(self) -> Iterator[Connection]:
            frames = [frame.name for frame in traceback.extract_stack() if frame.filename == sqlite.__file__]
            with trap.step(f"commit of {frames[0]}"), super()._transaction() as db:
                yield db

    write = OpenDevice.write

    async def write_trapped(device: OpenDevice, offset: int, data: bytes) -> None:
        with trap.step("write to a device"):
            await write(device, offset, data)

    call = Link.call

    async def call_trapped(link: Link, operation: str, **body: Any) -> Any:
        if operation in _QUESTIONS:
            return await call(link, operation, **body)
        with trap.step(f"command {operation}", is_persisted=False):
            return await call(link, operation, **body)

    setattr(daemon, "SqliteStore", TrappedStore)  # noqa: B010
    setattr(Link, "call", call_trapped)  # noqa: B010
    setattr(OpenDevice, "write", write_trapped)  # noqa: B010


if __name__ == "__main__":
    lay(Trap(Path(sys.argv.pop(1))))
    main()
