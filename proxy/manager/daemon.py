"""The manager as a process: ``standfast serve``."""

import fcntl
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as serve_http
from hypercorn.typing import ASGIFramework

from proxy.errors import RefusedError
from proxy.manager.api import application
from proxy.manager.service import SOCKET_PATH_MAX, Service
from proxy.manager.settings import Settings
from proxy.store.sqlite import SqliteStore

log = logging.getLogger("standfast.manager")

CONTROL_SOCKET = "control.sock"
#: How long requests under way may take to end when the manager is told to.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where a manager keeps what must survive (``state``) and its sockets (``run``)."""

    state: Path
    run: Path


def serve(places: Places, settings: Settings, *, keep_domains: bool) -> None:
    """Be the manager until SIGTERM or SIGINT.

    Args:
        keep_domains: leave the domain servers serving when this ends.

    Raises:
        StandfastError: it cannot begin; nothing was changed.
    """
    socket = places.run / CONTROL_SOCKET
    if len(bytes(socket)) > SOCKET_PATH_MAX:
        raise RefusedError(
            f"the control socket {socket} would have a path of {len(bytes(socket))} bytes; the system allows "
            f"{SOCKET_PATH_MAX}: use a shorter --run directory"
        )
    with ExitStack() as taken, ExitStack() as undo:
        for directory, option in ((places.state, "--state"), (places.run, "--run")):
            _make(directory, option, undo)
            taken.callback(os.close, _lock(directory, option, undo))
        store = SqliteStore(places.state / "standfast.db")
        taken.callback(store.close)
        bitmaps = places.state / "bitmaps"
        _make(bitmaps, "--state", undo)
        undo.pop_all()  # from here on nothing is refused any more
        trio.run(_main, places, Service(store, settings, places.run, bitmaps), keep_domains)


def _make(directory: Path, option: str, undo: ExitStack) -> None:
    """Make a directory and its parents; ``undo`` removes again what was not there before."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    try:
        for one in reversed(missing):
            one.mkdir(mode=0o755, exist_ok=True)
            undo.callback(_remove, one.rmdir)
    except OSError as error:
        raise RefusedError(f"{option} directory {directory} cannot be made: {error.strerror}") from error


def _remove(removal: Callable[[], None]) -> None:
    with suppress(OSError):
        removal()


def _lock(directory: Path, option: str, undo: ExitStack) -> int:
    """Take a directory for this process alone; the open lock file."""
    path = directory / "lock"
    is_new = not path.exists()
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RefusedError(f"{option} directory {directory} cannot be written: {error.strerror}") from error
    if is_new:
        undo.callback(_remove, path.unlink)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RefusedError(f"another manager uses the {option} directory {directory}; end it first") from None
    return lock


async def _main(places: Places, service: Service, keep_domains: bool) -> None:
    socket = places.run / CONTROL_SOCKET
    socket.unlink(missing_ok=True)
    config = Config()
    config.bind = [f"unix:{socket}"]
    config.umask = 0o117  # the socket gets mode 0660
    config.graceful_timeout = GRACE_S
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    stop = trio.Event()
    async with service.running(keep_domains=keep_domains), trio.open_nursery() as nursery:
        app: ASGIFramework = application(service)  # type: ignore[assignment]
        await nursery.start(_wait_signal, stop)
        await nursery.start(partial(serve_http, app, config, shutdown_trigger=stop.wait))
        os.umask(0o022)  # hypercorn leaves its own behind
        log.info("ready: %s", socket)
        await stop.wait()
        log.info("ending; domains %s", "are kept" if keep_domains else "are ended")
    socket.unlink(missing_ok=True)


async def _wait_signal(
    stop: trio.Event, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()
            return  # the next one ends the process at once
