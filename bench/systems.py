"""What is compared, each in the settings its documentation gives for this work.

All serve 192 MiB by default of RAM-backed files on a unix socket, take several connections, and buffer: on
tmpfs the page cache is the storage, so there is nothing that direct I/O could go around.

``standfast``
    Default settings: one domain on a group of three ``file:`` devices.
``standfast-mirror``
    Default settings: one domain with two legs, three devices and two, synchronous.
``nbdkit-file``
    nbdkit-file-plugin(1) as it comes, with nbdkit(1)'s default of 16 threads for each connection: what its
    documentation means for a client with many requests in flight. ``fadvise`` and ``cache`` are about disks.
``nbdkit-file-t1``
    The same with ``--threads=1``. It does one request at a time, which no storage but memory forgives; here
    it saves handing requests from thread to thread. Shown so that nobody has to ask.
``qemu-nbd``
    qemu-nbd(8) with ``--aio=io_uring``, its fastest here, and ``--cache=writeback``, its default.
``qemu-storage-daemon``
    The ``file`` driver with ``aio=io_uring``. Without an iothread: the export of QEMU 7.2 aborts in
    ``nbd_blockdev_client_closed`` when a client leaves an export that has one.
``qsd-quorum``
    The same with two files under the ``quorum`` driver: ``vote-threshold=2`` has every write wait for both,
    ``read-pattern=fifo`` reads from one, as a mirror does; the default would read and compare both.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.server import Server
from bench.site import running_site
from proxy.model import ALLOCATION_UNIT

#: More than any workload has.
_CONNECTIONS = 64
#: For a device's label, whatever its size makes of it.
_LABEL_ROOM = 2 * ALLOCATION_UNIT


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system lives: its files, its sockets and logs, and the bytes its clients see."""

    memory: Path
    run: Path
    size: int


@dataclass(frozen=True, slots=True)
class System:
    """A server that runs. ``pid``: of the process that all its others are below. ``setup``: for the record."""

    name: str
    uri: str
    pid: int
    setup: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of system: ``mirrored`` ones write everything twice and are compared among themselves."""

    name: str
    program: str
    mirrored: bool
    running: Callable[[str, Place], AbstractContextManager[System]]

    def is_installed(self) -> bool:
        """Whether this machine has it."""
        return shutil.which(self.program) is not None


@contextmanager
def _standfast(name: str, place: Place, widths: Sequence[int]) -> Iterator[System]:
    """One leg for each of ``widths``, which are numbers of devices."""
    with running_site(place.run) as site:
        groups = []
        setup = [" ".join(site.server.command)]
        for leg, width in enumerate(widths):
            share = -(-place.size // width // ALLOCATION_UNIT) * ALLOCATION_UNIT
            urls = [
                f"file://{place.memory}/leg{leg}-{device}?size={share + _LABEL_ROOM}"
                for device in range(width)
            ]
            groups.append(f"leg{leg}")
            site.create_group(groups[-1], urls)
            setup.append(
                f"standfast group create {groups[-1]} " + " ".join(f"--device '{url}'" for url in urls)
            )
        site.create_domain("bench", place.size, groups[0], groups[1:])
        backups = "".join(f" --backup {group}" for group in groups[1:])
        setup.append(f"standfast domain create bench --size {place.size} --active {groups[0]}{backups}")
        uri = site.create_disk("bench", "disk", place.size)
        setup.append(f"standfast disk create bench/disk --size {place.size}")
        yield System(name, uri, site.server.pid, tuple(setup))


def _one_leg(name: str, place: Place) -> AbstractContextManager[System]:
    return _standfast(name, place, [3])


def _two_legs(name: str, place: Place) -> AbstractContextManager[System]:
    return _standfast(name, place, [3, 2])


@contextmanager
def _peer(name: str, place: Place, export: str, command: Sequence[str]) -> Iterator[System]:
    socket = place.run / "nbd.sock"
    with Server([*command], socket, place.run) as server:
        yield System(name, f"nbd+unix:///{export}?socket={socket}", server.pid, (" ".join(command),))


def _image(place: Place, name: str = "image") -> Path:
    image = place.memory / name
    with open(image, "xb") as file:
        file.truncate(place.size)
    return image


def _nbdkit(name: str, place: Place, *options: str) -> AbstractContextManager[System]:
    socket = f"--unix={place.run}/nbd.sock"
    return _peer(
        name, place, "", ["nbdkit", "--foreground", socket, *options, "file", f"file={_image(place)}"]
    )


def _nbdkit_serial(name: str, place: Place) -> AbstractContextManager[System]:
    return _nbdkit(name, place, "--threads=1")


def _qemu_nbd(name: str, place: Place) -> AbstractContextManager[System]:
    command = [
        "qemu-nbd",
        "--format=raw",
        "--aio=io_uring",
        "--cache=writeback",
        f"--shared={_CONNECTIONS}",
        "--persistent",
        f"--socket={place.run}/nbd.sock",
        str(_image(place)),
    ]
    return _peer(name, place, "", command)


def _storage_daemon(
    name: str, place: Place, *blockdevs: str, node: str = "disk"
) -> AbstractContextManager[System]:
    command = [
        "qemu-storage-daemon",
        *(f"--blockdev={blockdev}" for blockdev in blockdevs),
        f"--nbd-server=addr.type=unix,addr.path={place.run}/nbd.sock,max-connections={_CONNECTIONS}",
        f"--export=type=nbd,id=export,node-name={node},name=disk,writable=on",
    ]
    return _peer(name, place, "disk", command)


def _file_node(place: Place, name: str) -> str:
    return f"driver=file,node-name={name},filename={_image(place, name)},aio=io_uring"


def _qsd(name: str, place: Place) -> AbstractContextManager[System]:
    return _storage_daemon(name, place, _file_node(place, "disk"))


def _qsd_quorum(name: str, place: Place) -> AbstractContextManager[System]:
    quorum = (
        "driver=quorum,node-name=quorum,vote-threshold=2,read-pattern=fifo,children.0=first,children.1=second"
    )
    nodes = (_file_node(place, "first"), _file_node(place, "second"))
    return _storage_daemon(name, place, *nodes, quorum, node="quorum")


STANDFAST = "standfast"
STANDFAST_MIRROR = "standfast-mirror"
NBDKIT = "nbdkit-file"
QEMU_NBD = "qemu-nbd"
QSD_QUORUM = "qsd-quorum"

KINDS = (
    Kind(STANDFAST, sys.executable, False, _one_leg),
    Kind(STANDFAST_MIRROR, sys.executable, True, _two_legs),
    Kind(NBDKIT, "nbdkit", False, _nbdkit),
    Kind("nbdkit-file-t1", "nbdkit", False, _nbdkit_serial),
    Kind(QEMU_NBD, "qemu-nbd", False, _qemu_nbd),
    Kind("qemu-storage-daemon", "qemu-storage-daemon", False, _qsd),
    Kind(QSD_QUORUM, "qemu-storage-daemon", True, _qsd_quorum),
)
