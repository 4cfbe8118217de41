"""The NBD listeners of a domain: clients come in here, negotiate, and are handed to the engine."""

import errno
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import trio

from backends.nbdproto import TransmissionFlag
from proxy.domainserver.negotiation import Chosen, Export, Hangup, Negotiation, Send
from proxy.engine import Engine

log = logging.getLogger("standfast.door")

#: A client negotiates in milliseconds; one that takes longer than this is no client.
NEGOTIATION_TIMEOUT_S = 30
#: Of clients negotiating at once; the next wait in the listen queue.
NEGOTIATIONS_MAX = 128
LISTEN_BACKLOG = 1024
#: Room for a batch of large answers in one call; the kernel takes as much of it as it allows.
SEND_BUFFER_BYTES = 4 << 20
#: socket(7); Python's module has no name for it.
_SO_SNDBUFFORCE = 32

#: What every disk offers. The engine puts FLUSH and FUA on all legs, whichever connection asks, so several
#: connections may share a disk.
TRANSMISSION_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
)
#: The smallest request that needs no read before the write on the common devices.
BLOCK_SIZE_MIN = 512
BLOCK_SIZE_PREFERRED = 4096
PAYLOAD_MAX = 32 << 20


def export_of(domain: str, disk: str, size: int) -> Export:
    """What a client of ``disk`` is told; ``size`` in bytes."""
    return Export(
        name=disk,
        description=f"disk {disk} of Standfast domain {domain}",
        size=size,
        flags=TRANSMISSION_FLAGS,
        block_size_min=BLOCK_SIZE_MIN,
        block_size_preferred=BLOCK_SIZE_PREFERRED,
        payload_max=PAYLOAD_MAX,
    )


class Doors:
    """All listeners of one domain.

    Args:
        engine: takes over sockets that have chosen a disk.
        domain: its name, for the log.
    """

    def __init__(self, engine: Engine, domain: str) -> None:
        self.exports: Mapping[str, Export] = {}
        self.numbers: Mapping[str, int] = {}
        self.clients: dict[int, str] = {}  # connection number to disk name
        self._engine = engine
        self._domain = domain
        self._limiter = trio.CapacityLimiter(NEGOTIATIONS_MAX)
        self._scopes: list[trio.CancelScope] = []

    async def serve_unix(
        self, path: Path, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at ``path`` until closed. The socket takes the place of a dead predecessor's in one step."""
        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        fresh = path.with_name(path.name + "~")
        fresh.unlink(missing_ok=True)
        with listener:
            await listener.bind(str(fresh))
            fresh.chmod(0o660)
            listener.listen(LISTEN_BACKLOG)
            fresh.rename(path)
            task_status.started()
            try:
                await self._accept(listener)
            finally:
                path.unlink(missing_ok=True)

    async def serve_tcp(
        self, host: str, port: int, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at a TCP address until closed. Raises OSError when it cannot be had."""
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=LISTEN_BACKLOG)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept, listener.socket)
            task_status.started()

    def close(self) -> None:
        """Accept no more clients; those negotiating are dropped."""
        for scope in self._scopes:
            scope.cancel()

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        with listener, trio.CancelScope() as scope:
            self._scopes.append(scope)
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        client, _ = await listener.accept()
                    except OSError as error:
                        # Out of descriptors or memory, or the client is gone already: the door stays open.
                        log.warning("accept: %s", error)
                        await trio.sleep(0.1)
                        continue
                    nursery.start_soon(self._negotiate, client)

    async def _negotiate(self, client: trio.socket.SocketType) -> None:
        """Lead one client to a disk, or hang up. Whatever it does ends with its own connection."""
        with client:
            async with self._limiter:
                with trio.move_on_after(NEGOTIATION_TIMEOUT_S) as deadline:
                    try:
                        await self._lead(client)
                    except OSError as error:
                        log.debug("client gone while negotiating: %s", error)
                    except Exception:
                        # The boundary: whatever a client sent, only its own connection ends.
                        log.exception("client dropped")
                if deadline.cancelled_caught:
                    log.info("client dropped: negotiation took longer than %d s", NEGOTIATION_TIMEOUT_S)

    async def _lead(self, client: trio.socket.SocketType) -> None:
        negotiation = Negotiation(self.exports)
        await _send_all(client, negotiation.greeting)
        while True:
            for event in negotiation.receive(await client.recv(65536)):
                match event:
                    case Send(data):
                        await _send_all(client, data)
                    case Hangup(reason):
                        log.debug("client dropped: %s", reason)
                        return
                    case Chosen():
                        self._hand_over(client, event)
                        return

    def _hand_over(self, client: trio.socket.SocketType, chosen: Chosen) -> None:
        disk = chosen.export.name
        if disk not in self.numbers:
            return  # removed since it was chosen
        descriptor = client.detach()
        try:
            prepare_socket(descriptor)
        except OSError:
            os.close(descriptor)
            return
        number = self._engine.add_connection(
            descriptor,
            self.numbers[disk],
            obeys_block_size=chosen.obeys_block_size,
            leftover=chosen.leftover,
        )
        self.clients[number] = disk
        log.debug("client %d: disk %s", number, disk)

    def forget(self, number: int, code: int) -> None:
        """The engine says that a connection is gone; ``code`` is an errno, or 0."""
        disk = self.clients.pop(number, None)
        if code == errno.ETIMEDOUT:
            log.warning("client %d of disk %s was dropped: it kept others waiting for memory", number, disk)
        log.debug("client %d: gone from disk %s", number, disk)


async def _send_all(client: trio.socket.SocketType, data: bytes) -> None:
    # Not a trio.SocketStream: that would set TCP_NOTSENT_LOWAT, which chokes the data path later.
    while data:
        data = data[await client.send(data) :]


def prepare_socket(descriptor: int) -> None:
    """Make a connected socket fit for the ring: blocking, since it waits itself, with room to send."""
    os.set_blocking(descriptor, True)
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, SEND_BUFFER_BYTES)
                break
            except PermissionError:
                continue  # only root may go past the system's limit
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
