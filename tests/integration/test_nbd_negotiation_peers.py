"""Both negotiation cores against other people's NBD: nbdkit and qemu-nbd, nbdinfo and qemu-io.

Every server is started on a socket that listens already (systemd's socket activation, which nbdkit and
qemu-nbd both know), so a connection waits in its queue and nobody has to poll for a server to be ready.
"""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from backends import nbdcommand
from backends.nbdcommand import ReplyDecoder, Request
from backends.nbdnegotiation import ClientNegotiation, NbdNegotiationError, Remote
from backends.nbdproto import ReplyType, TransmissionFlag
from proxy.domainserver.negotiation import Chosen, Export, Hangup, Negotiation, Send

TIMEOUT_S = 10
SIZE = 1 << 20


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


@contextmanager
def serving(path: Path, *command: str) -> Iterator[None]:
    """An NBD server program on the socket ``path``, ended afterwards."""
    # The server wants the socket as descriptor 3 and its own process id in LISTEN_PID.
    activation = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null'
    with listening(path) as listener:
        server = subprocess.Popen(["sh", "-c", activation, "sh", *command], stdin=listener.fileno())
    try:
        yield
    finally:
        server.kill()
        server.wait()


def negotiate(connection: socket.socket, export_name: str) -> Remote:
    negotiation = ClientNegotiation(export_name, device="nbd+unix://test")
    while negotiation.remote is None:
        try:
            connection.sendall(negotiation.receive(connection.recv(4096)))
        except NbdNegotiationError as error:
            connection.sendall(error.farewell)
            raise
    return negotiation.remote


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        yield connection


def command(connection: socket.socket, request: Request) -> bytes:
    connection.sendall(request.encode())
    decoder = ReplyDecoder(request, device="nbd+unix://test")
    while (answer := decoder.receive(connection.recv(4096))) is None:
        pass
    return answer


def assert_reads_what_it_writes(connection: socket.socket) -> None:
    label = bytes(range(256)) * 32
    assert command(connection, nbdcommand.write(8192, label, cookie=1)) == b""
    assert command(connection, nbdcommand.flush(cookie=2)) == b""
    assert command(connection, nbdcommand.read(8192, len(label), cookie=3)) == label
    connection.sendall(nbdcommand.disconnect().encode())
    assert connection.recv(1) == b""


@needs("nbdkit")
@pytest.mark.parametrize("handshake_mask", [3, 2, 1, 0])
def test_client_of_nbdkit_negotiates_and_reads_what_it_writes(tmp_path: Path, handshake_mask: int) -> None:
    path = tmp_path / "nbd.sock"
    nbdkit = ["nbdkit", "-f", f"--mask-handshake={handshake_mask}", "memory", "1M"]
    with serving(path, *nbdkit), connected(path) as connection:
        remote = negotiate(connection, "")
        assert remote.size == SIZE
        assert TransmissionFlag.SEND_FLUSH in remote.flags
        assert_reads_what_it_writes(connection)


@needs("nbdkit")
def test_client_of_nbdkit_learns_its_block_sizes(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=1M"]
    nbdkit = ["nbdkit", "-f", "--filter=blocksize-policy", "memory", "1M", *sizes]
    with serving(path, *nbdkit), connected(path) as connection:
        remote = negotiate(connection, "disk")
        assert remote == Remote(SIZE, remote.flags, 4096, 64 << 10, 1 << 20)
        assert_reads_what_it_writes(connection)


@needs("nbdkit")
def test_client_of_nbdkit_oldstyle_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with (
        serving(path, "nbdkit", "-f", "--oldstyle", "memory", "1M"),
        connected(path) as connection,
        pytest.raises(NbdNegotiationError, match="oldstyle"),
    ):
        negotiate(connection, "")


@needs("qemu-nbd")
def test_client_of_qemu_nbd_negotiates_and_reads_what_it_writes(tmp_path: Path) -> None:
    path, image = tmp_path / "nbd.sock", tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    qemu_nbd = ["qemu-nbd", "--persistent", "--format=raw", "--export-name=disk", str(image)]
    with serving(path, *qemu_nbd):
        with connected(path) as connection:
            remote = negotiate(connection, "disk")
            assert (remote.size, remote.payload_max) == (SIZE, 32 << 20)
            assert_reads_what_it_writes(connection)
        with connected(path) as connection:
            with pytest.raises(NbdNegotiationError, match="refused export 'nope' with ERR_UNKNOWN") as caught:
                negotiate(connection, "nope")
            assert caught.value.reply_type == ReplyType.ERR_UNKNOWN
            assert connection.recv(20)[8:16] == b"\0\0\0\2\0\0\0\1", "ABORT is acknowledged"


FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN
EXPORTS = {
    "root": Export("root", "the root disk", 5 << 20, FLAGS, 512, 4096, 1 << 20),
    "swap": Export("swap", "", 1 << 40, FLAGS | TransmissionFlag.READ_ONLY, 1, 65536, 32 << 20),
}


class Host:
    """Our server's core behind a blocking socket. A client that reaches transmission is hung up on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: Queue[Chosen | Hangup] = Queue()

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(TIMEOUT_S)
                try:
                    self.ends.put(self.negotiate(connection))
                except OSError as error:
                    # A client need not wait for the answer to its ABORT.
                    self.ends.put(Hangup(str(error)))

    def negotiate(self, connection: socket.socket) -> Chosen | Hangup:
        negotiation = Negotiation(EXPORTS)
        connection.sendall(negotiation.greeting)
        while True:
            for event in negotiation.receive(connection.recv(4096)):
                if not isinstance(event, Send):
                    return event
                connection.sendall(event.data)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "nbd.sock")
    with listening(host.path) as listener:
        thread = Thread(target=host.serve, args=(listener,))
        thread.start()
        try:
            yield host
        finally:
            # Closing would not wake accept.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def nbdinfo(*arguments: str) -> dict[str, Any]:
    done = run("nbdinfo", "--json", "--no-content", *arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@needs("nbdinfo")
def test_server_core_tells_nbdinfo_all_of_one_export(host: Host) -> None:
    info = nbdinfo(f"nbd+unix:///root?socket={host.path}")
    assert (info["protocol"], info["structured"]) == ("newstyle-fixed", False)
    [export] = info["exports"]
    assert (export["export-name"], export["description"], export["export-size"]) == (
        "root",
        "the root disk",
        5 << 20,
    )
    assert [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")] == [
        512,
        4096,
        1 << 20,
    ]
    assert {name for name, value in export.items() if value is True} == {"can_flush", "can_multi_conn"}


@needs("nbdinfo")
def test_server_core_lists_its_exports_to_nbdinfo(host: Host) -> None:
    exports = nbdinfo("--list", f"nbd+unix:///?socket={host.path}")["exports"]
    assert {export["export-name"]: export["export-size"] for export in exports} == {
        "root": 5 << 20,
        "swap": 1 << 40,
    }
    assert {export["export-name"]: export["is_read_only"] for export in exports} == {
        "root": False,
        "swap": True,
    }


@needs("nbdinfo")
@pytest.mark.parametrize(("name", "shown"), [("nope", "export: nope"), ("", "the default export")])
def test_server_core_tells_nbdinfo_that_an_export_is_unknown(host: Host, name: str, shown: str) -> None:
    done = run("nbdinfo", f"nbd+unix:///{name}?socket={host.path}")
    assert done.returncode == 1
    assert f"No such file or directory for {shown}" in done.stderr


@needs("nbdinfo")
def test_server_core_lets_nbdinfo_into_transmission(host: Host) -> None:
    done = run("nbdinfo", "--size", f"nbd+unix:///root?socket={host.path}")
    assert done.stdout == f"{5 << 20}\n"
    assert host.ends.get(timeout=TIMEOUT_S) == Chosen(EXPORTS["root"], obeys_block_size=True, leftover=b"")


@needs("qemu-io")
def test_server_core_lets_qemu_into_transmission(host: Host) -> None:
    done = run("qemu-io", "-r", "-f", "raw", "-c", "length", f"nbd+unix:///swap?socket={host.path}")
    assert done.stdout == "1 TiB\n"
    assert host.ends.get(timeout=TIMEOUT_S) == Chosen(EXPORTS["swap"], obeys_block_size=True, leftover=b"")


@needs("qemu-nbd")
def test_server_core_lists_its_exports_to_qemu(host: Host) -> None:
    done = run("qemu-nbd", "--list", f"--socket={host.path}")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[:4] == [
        "exports available: 2",
        "export: 'root'",
        "description: the root disk",
        "size:  5242880",
    ]
    assert "max block: 33554432" in lines
