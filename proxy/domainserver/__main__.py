"""Run one domain server: ``python -m proxy.domainserver NAME UUID --directory RUN/NAME --deadline-ms N``.

The manager starts it. Its directory gets ``nbd.sock`` (clients), ``control.sock`` (the manager) and ``lock``,
which keeps a second one away from the same place and says who it is. SIGTERM ends it as the manager's stop does.
"""

import argparse
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from uuid import UUID

import trio

from proxy.domainserver.control import Server
from proxy.domainserver.doors import Doors
from proxy.engine import Engine
from proxy.errors import NBD_ERROR_BY_ERRNO
from proxy.failover import MEDIUM_ERRORS


def main() -> int:
    """Serve until told to stop; 0 when everything acknowledged is on every leg."""
    parser = argparse.ArgumentParser(prog="standfast-domain")
    parser.add_argument("name")
    parser.add_argument("uuid", type=UUID)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--deadline-ms", type=int, required=True)
    parser.add_argument("--probe-ms", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=os.environ.get("STANDFAST_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    lock = os.open(arguments.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"domain {arguments.name} is being served by another process", file=sys.stderr)
        return 1
    # Whoever cannot have the lock finds out here who has it; the file is never empty in between.
    identity = f"{os.getpid()} {arguments.uuid}\n".encode()
    os.pwrite(lock, identity, 0)
    os.ftruncate(lock, len(identity))
    engine = Engine(
        nbd_errors={number: int(value) for number, value in NBD_ERROR_BY_ERRNO.items()},
        deadline_ns=arguments.deadline_ms * 1_000_000,
        medium_errors=MEDIUM_ERRORS,
        probe_ns=arguments.probe_ms * 1_000_000,
    )
    server = Server(arguments.name, arguments.directory, engine=engine, doors=Doors(engine, arguments.name))
    return 0 if trio.run(_serve, server, arguments.directory) else 1


async def _serve(server: Server, directory: Path) -> bool:
    server.engine.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.watch_engine, nursery)
        await nursery.start(_serve_control, server, directory / "control.sock")
        nursery.start_soon(_stop_on_sigterm, server)
        await server.stopped.wait()
        nursery.cancel_scope.cancel()
    server.engine.stop()
    return server.clean


async def _serve_control(
    server: Server, path: Path, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    path.unlink(missing_ok=True)
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(4)
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    client, _ = await listener.accept()
                    nursery.start_soon(server.serve_manager, trio.SocketStream(client))
        finally:
            path.unlink(missing_ok=True)


async def _stop_on_sigterm(server: Server) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            await server.stop()
            server.stopped.set()
            return


sys.exit(main())
