"""The one conformance suite that every backend passes, then what is particular to each.

A ``Case`` is one kind of device made ready: real files, loop devices and nbdkit servers.
"""

import errno
import itertools
import mmap
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from backends import (
    DataPath,
    DeviceBusyError,
    DeviceError,
    DeviceUnavailableError,
    DeviceUrlError,
    OpenDevice,
    linux,
    nbdcommand,
    open_device,
)
from backends.signature import foreign_signature
from proxy.label import LABEL_SIZE, Label, LabelMissingError

MIB = 1 << 20
#: More than the areas that are looked at for a signature, so that there is a middle.
SIZE = 9 * MIB
#: For what is expected at once; only a failing test waits so long.
TIMEOUT_S = 10
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One kind of device: ``url`` can be opened, ``missing_url`` cannot."""

    url: str
    missing_url: str
    block_size: int
    can_lock: bool = True


def program(name: str) -> str:
    """The path of a program; the test is skipped when it is not installed."""
    path = shutil.which(name, path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def sparse_file(path: Path) -> Path:
    with path.open("wb") as image:
        image.truncate(SIZE)
    return path


def unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@contextmanager
def nbdkit(listener: socket.socket, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """nbdkit on a socket that listens already, so that nobody has to poll for it to be ready."""
    # systemd's socket activation: the socket is descriptor 3, and LISTEN_PID the server's own id.
    activation = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 0</dev/null'
    command = ["sh", "-c", activation, "sh", program("nbdkit"), "--exit-with-parent", *arguments]
    with listener:
        server = subprocess.Popen(command, stdin=listener.fileno())
    try:
        yield server
    finally:
        server.kill()
        server.wait(TIMEOUT_S)


def file_direct(stack: ExitStack, directory: Path) -> Case:
    with sparse_file(directory / "a b+c.img").open("rb") as image:
        if linux.is_in_memory(image.fileno()):
            pytest.skip("the temporary directory is in memory")
        alignment = linux.direct_alignment(image.fileno())
    if not alignment:
        pytest.skip("the temporary directory's file system has no O_DIRECT, or does not tell its alignment")
    return Case(f"file://{directory}/a%20b+c.img", f"file://{directory}/absent.img", alignment)


def file_buffered(stack: ExitStack, directory: Path) -> Case:
    image = sparse_file(directory / "a.img")
    return Case(f"file://{image}?cache=buffered", f"file://{directory}/absent.img?cache=buffered", 1)


def file_in_memory(stack: ExitStack, directory: Path) -> Case:
    memory = Path(f"/dev/shm/test-backends-{os.getpid()}")
    memory.mkdir()
    stack.callback(shutil.rmtree, memory)
    with sparse_file(memory / "a.img").open("rb") as image:
        if not linux.is_in_memory(image.fileno()):
            pytest.skip("/dev/shm is not a memory file system")
    return Case(f"file://{memory}/a.img", f"file://{memory}/absent.img", 1)


def block(block_size: int) -> Callable[[ExitStack, Path], Case]:
    def prepare(stack: ExitStack, directory: Path) -> Case:
        image = sparse_file(directory / "disk.img")
        losetup = program("losetup")
        attach = subprocess.run(
            [losetup, "--find", "--show", "--sector-size", str(block_size), image],
            capture_output=True,
            text=True,
            check=False,
        )
        if attach.returncode != 0:
            pytest.skip(f"no loop device to be had: {attach.stderr.strip()}")
        node = attach.stdout.strip()
        stack.callback(subprocess.run, [losetup, "--detach", node], check=True)
        link = directory / "by-id"
        link.symlink_to(node)
        return Case(f"block://{link}", f"block://{directory}/absent", block_size)

    return prepare


def nbd_tcp(family: socket.AddressFamily, host: str, url_host: str) -> Callable[[ExitStack, Path], Case]:
    def prepare(stack: ExitStack, directory: Path) -> Case:
        listener = socket.socket(family)
        unheard = stack.enter_context(socket.socket(family))
        try:
            listener.bind((host, 0))
            unheard.bind((host, 0))
        except OSError as error:
            listener.close()
            pytest.skip(f"{host} cannot be used: {error}")
        listener.listen()
        port, port_unheard = listener.getsockname()[1], unheard.getsockname()[1]
        stack.enter_context(nbdkit(listener, "memory", str(SIZE)))
        return Case(f"nbd://{url_host}:{port}/", f"nbd://{url_host}:{port_unheard}/", 1, can_lock=False)

    return prepare


def nbd_unix(stack: ExitStack, directory: Path) -> Case:
    image = sparse_file(directory / "disk.img")
    stack.enter_context(nbdkit(unix_listener(directory / "nbd"), "file", str(image)))
    url = f"nbd+unix:///vol?socket={directory}"
    return Case(f"{url}/nbd", f"{url}/absent", 1, can_lock=False)


def nbd_unix_strict(stack: ExitStack, directory: Path) -> Case:
    """A server that refuses what is not a multiple of 4 KiB, and more than 64 KiB at a time."""
    policy = ["minimum=4096", "preferred=4096", "maximum=65536", "error-policy=error"]
    arguments = ["--filter=blocksize-policy", "memory", str(SIZE), *(f"blocksize-{each}" for each in policy)]
    stack.enter_context(nbdkit(unix_listener(directory / "nbd"), *arguments))
    url = f"nbd+unix:///?socket={directory}"
    return Case(f"{url}/nbd", f"{url}/absent", 4096, can_lock=False)


#: The process remembers the names of memory devices, so that each test needs one of its own.
_memory_names = (f"conformance-{number}" for number in itertools.count())


def memory(stack: ExitStack, directory: Path) -> Case:
    name = next(_memory_names)
    return Case(f"memory:{name}?size=9M", f"memory:{name}", 1)


KINDS: dict[str, Callable[[ExitStack, Path], Case]] = {
    "file-direct": file_direct,
    "file-buffered": file_buffered,
    "file-in-memory": file_in_memory,
    "block-512": block(512),
    "block-4096": block(4096),
    "nbd-tcp": nbd_tcp(socket.AF_INET, "127.0.0.1", "localhost"),
    "nbd-tcp6": nbd_tcp(socket.AF_INET6, "::1", "[::1]"),
    "nbd-unix": nbd_unix,
    "nbd-unix-strict": nbd_unix_strict,
    "memory": memory,
}


@pytest.fixture(params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with ExitStack() as stack:
        yield KINDS[request.param](stack, tmp_path)


def pattern(length: int) -> bytes:
    """Bytes that repeat only after 64 KiB, so that no two blocks are alike."""
    words = b"".join(struct.pack(">H", number) for number in range(32768))
    return (words * (length // len(words) + 1))[:length]


async def transfer(device: OpenDevice) -> bytes:
    """The first block, read by the detached descriptor as the engine would, which is then closed."""
    info, url = device.info, device.url
    length = max(info.block_size, 512)
    descriptor = device.detach()
    try:
        assert os.get_blocking(descriptor)
        assert not os.get_inheritable(descriptor)
        if info.path is DataPath.FILE:
            buffer = mmap.mmap(-1, length)
            assert os.preadv(descriptor, [buffer], 0) == length
            return buffer[:]
        request = nbdcommand.read(0, length, cookie=1)
        decoder = nbdcommand.ReplyDecoder(request, device=url)
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.sendall(request.encode())
            while (data := decoder.receive(connection.recv(65536))) is None:
                pass
            return data
    finally:
        os.close(descriptor)


async def test_open_of_a_missing_device_is_refused_in_one_line_that_names_it(case: Case) -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        await open_device(case.missing_url, create=True)

    message = str(caught.value)
    assert message.startswith(case.missing_url)
    assert "\n" not in message
    assert caught.value.error_number in (errno.ENOENT, errno.ECONNREFUSED)


async def test_open_tells_what_the_engine_needs(case: Case) -> None:
    async with await open_device(case.url, create=True) as device:
        info = device.info

    assert info.size == SIZE
    assert info.block_size == case.block_size
    assert info.transfer_max >= 65536
    assert info.path is (DataPath.NBD if case.url.startswith("nbd") else DataPath.FILE)
    assert info.in_memory is ("/dev/shm" in case.url or case.url.startswith("memory"))
    assert info.can_flush
    assert info.can_fua


async def test_write_at_any_offset_is_read_back_and_leaves_its_neighbours(case: Case) -> None:
    content = pattern(SIZE)
    async with await open_device(case.url, create=True) as device:
        await device.write(0, content)
        for offset, length in [
            (0, 4096),
            (SIZE - 4096, 4096),
            (0, 1),
            (SIZE - 1, 1),
            (1, 4095),
            (4095, 2),
            (511, 4098),
            (123457, 654321),
            (4096, 0),
            (SIZE, 0),
        ]:
            data = bytes(reversed(pattern(length)))
            content = content[:offset] + data + content[offset + length :]

            await device.write(offset, data)

            assert await device.read(offset, length) == data
        await device.flush()
        assert await device.read(0, SIZE) == content


async def test_fresh_device_reads_as_zeroes(case: Case) -> None:
    async with await open_device(case.url, create=True) as device:
        assert await device.read(0, SIZE) == bytes(SIZE)


async def test_transfer_outside_the_device_is_refused_and_it_goes_on(case: Case) -> None:
    async with await open_device(case.url, create=True) as device:
        for offset, length in [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (-1, 1), (1 << 70, 1)]:
            with pytest.raises(DeviceError, match=r"not inside its 9437184 bytes") as caught:
                await device.read(offset, length)
            assert caught.value.error_number == errno.EINVAL

        with pytest.raises(DeviceError, match=r"not inside its 9437184 bytes") as caught:
            await device.write(SIZE - 1, b"ab")
        assert caught.value.error_number == errno.ENOSPC

        assert await device.read(SIZE - 1, 1) == b"\0"


async def test_reopened_device_keeps_its_content(case: Case) -> None:
    async with await open_device(case.url, create=True) as device:
        await device.write(1000, b"kept")
        await device.flush()

    async with await open_device(case.url, create=True) as device:
        assert await device.read(1000, 4) == b"kept"


async def test_detached_descriptor_is_usable_and_the_callers_own(case: Case) -> None:
    async with await open_device(case.url, create=True) as device:
        await device.write(0, pattern(4096))

        data = await transfer(device)

    assert data == pattern(4096)[: len(data)]


async def test_finished_device_refuses_every_use(case: Case) -> None:
    device = await open_device(case.url, create=True)
    await device.aclose()
    await device.aclose()

    with pytest.raises(trio.ClosedResourceError):
        await device.read(0, 1)
    with pytest.raises(trio.ClosedResourceError):
        await device.write(0, b"x")
    with pytest.raises(trio.ClosedResourceError):
        await device.flush()
    with pytest.raises(trio.ClosedResourceError):
        await device.lock([(0, 1)], timeout_s=0)
    with pytest.raises(trio.ClosedResourceError):
        device.detach()


async def test_device_closed_by_a_cancelled_task_leaks_nothing(case: Case) -> None:
    device = await open_device(case.url, create=True)
    descriptors = len(os.listdir("/proc/self/fd"))
    with trio.CancelScope() as scope:
        async with device:
            scope.cancel()

    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    with pytest.raises(trio.ClosedResourceError):
        device.detach()


async def test_lock_excludes_a_second_opener_until_the_descriptor_is_closed(case: Case) -> None:
    async with await open_device(case.url, create=True) as first, await open_device(case.url) as second:
        await first.lock([(8192, 4096), (0, 4096)], timeout_s=0)
        if not case.can_lock:
            await second.lock([(0, 4096)], timeout_s=0)
            return

        descriptor = first.detach()
        with pytest.raises(DeviceBusyError, match=r": 100 bytes at offset 8192 are locked by another"):
            await second.lock([(8192, 100), (4096, 4096)], timeout_s=0.05)
        async with await open_device(case.url) as third:
            # What the second got before it met the lock it gave back.
            await third.lock([(4096, 4096)], timeout_s=0)
        await second.lock([(12288, 4096)], timeout_s=0)
        os.close(descriptor)
        await second.lock([(0, 4096), (8192, 4096)], timeout_s=TIMEOUT_S)


LOCKER = """
import sys, trio
from backends import open_device

async def main():
    async with await open_device(sys.argv[1]) as device:
        await device.lock([(0, 4096)], timeout_s=0)
        print("locked", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)

trio.run(main)
"""


@pytest.mark.parametrize(
    "case", [kind for kind in KINDS if kind.startswith(("file", "block"))], indirect=True
)
async def test_lock_of_a_process_that_dies_is_released(case: Case) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCKER, case.url],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        async with await open_device(case.url) as device:
            with pytest.raises(DeviceBusyError):
                await device.lock([(0, 1)], timeout_s=0)

            holder.kill()

            await device.lock([(0, 1)], timeout_s=TIMEOUT_S)


async def test_label_written_is_read_back_and_a_blank_device_has_none(case: Case) -> None:
    label = Label(UUID(int=1), UUID(int=2), "alpha", 0, 3, SIZE, 65536, 1)
    async with await open_device(case.url, create=True) as device:
        with pytest.raises(LabelMissingError):
            Label.decode(await device.read(0, LABEL_SIZE), url=device.url)
        await device.write(0, label.encode())
        await device.flush()

    async with await open_device(case.url) as device:
        assert Label.decode(await device.read(0, LABEL_SIZE), url=device.url) == label
        # Nobody else recognises it as theirs.
        assert await foreign_signature(device) is None


#: The least that libblkid takes for each kind, as (offset, bytes).
SQUASHFS = (0, b"hsqs" + bytes(24) + b"\4\0\0\0")
EXT2 = (1024 + 56, b"\x53\xef")
PARTITION = struct.pack("<8BII", 0, 0, 2, 0, 0x83, 0, 0, 0, 2048, 4096)
BOOT_MARK = (510, b"\x55\xaa")
MBR = (446, PARTITION)
RAID_AT_THE_END = (SIZE - 65536, struct.pack("<4I", 0xA92B4EFC, 0, 90, 0))
#: Its boot code lies where a partition table would be, and its $MFT behind what is copied.
NTFS = (0, struct.pack("<3s8sHB26xQQQbxxxb", b"\xebR\x90", b"NTFS    ", 512, 8, 131071, 786432, 2, -10, 1))
BOOT_CODE = (446, bytes(range(1, 65)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], None),
        ([(4 * MIB + 4096, b"data in the middle")], None),
        ([SQUASHFS], "squashfs file system"),
        ([MBR, BOOT_MARK], "dos partition table"),
        ([RAID_AT_THE_END], "linux_raid_member RAID or volume member"),
        ([SQUASHFS, EXT2], "content of more than one kind"),
        ([NTFS, BOOT_CODE, BOOT_MARK], "boot sector"),
        ([(0, b"QFI\xfb\0\0\0\3")], "qcow2 disk image"),
    ],
    ids=["blank", "data", "file-system", "partition-table", "raid", "ambivalent", "ntfs", "image"],
)
async def test_signature_of_foreign_content_is_recognised(
    case: Case, content: list[tuple[int, bytes]], words: str | None
) -> None:
    program("blkid")
    async with await open_device(case.url, create=True) as device:
        for offset, data in content:
            await device.write(offset, data)
        await device.flush()

        found = await foreign_signature(device)

    assert found is None if words is None else found is not None and words in found


async def test_signature_of_a_real_file_system_has_its_name(case: Case, tmp_path: Path) -> None:
    image = sparse_file(tmp_path / "ext4.img")
    subprocess.run([program("mkfs.ext4"), "-q", "-L", "backup", image], check=True)
    async with await open_device(case.url, create=True) as device:
        await device.write(0, image.read_bytes())
        await device.flush()

        found = await foreign_signature(device)

    assert found is not None
    assert found.startswith("ext4 file system 'backup' (UUID ")


async def test_signature_without_blkid_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    async with await open_device(f"file://{sparse_file(tmp_path / 'a.img')}") as device:
        with pytest.raises(DeviceError, match="blkid is missing; install util-linux"):
            await foreign_signature(device)


async def test_file_absent_is_created_durably_when_a_size_is_given(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    async with await open_device(f"file://{path}?size=1M", create=True) as device:
        assert device.info.size == MIB

    status = path.stat()
    assert status.st_size == MIB
    assert status.st_blocks == 0
    assert stat.S_IMODE(status.st_mode) == 0o600


@pytest.mark.parametrize(("query", "create"), [("", True), ("?size=1M", False)])
async def test_file_absent_is_not_created_unasked(tmp_path: Path, query: str, create: bool) -> None:
    path = tmp_path / "new.img"
    with pytest.raises(DeviceUnavailableError, match="no such file"):
        await open_device(f"file://{path}{query}", create=create)

    assert not path.exists()


async def test_file_in_a_missing_directory_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailableError, match=f"no directory {tmp_path}/absent"):
        await open_device(f"file://{tmp_path}/absent/new.img?size=1M", create=True)


async def test_file_that_cannot_be_made_durable_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DeviceUnavailableError, match="cannot be created with 1048576 bytes") as caught:
        await open_device(f"file://{tmp_path}/new.img?size=1M", create=True)

    assert caught.value.error_number == errno.EIO
    assert list(tmp_path.iterdir()) == []


async def test_file_smaller_than_its_url_says_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.img")
    with pytest.raises(
        DeviceUnavailableError, match=r"has 9437184 bytes \(9M\), the URL says 10485760 \(10M\)"
    ):
        await open_device(f"file://{path}?size=10M", create=True)


async def test_file_larger_than_its_url_says_is_not_shrunk(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.img")
    async with await open_device(f"file://{path}?size=1M", create=True) as device:
        assert device.info.size == SIZE

    assert path.stat().st_size == SIZE


async def test_file_with_a_partial_block_at_its_end_is_rounded_down(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.img")
    os.truncate(path, MIB + 100)
    async with await open_device(f"file://{path}") as device:
        assert device.info.size == MIB + 100 - 100 % device.info.block_size
        await device.write(device.info.size - 10, b"0123456789")
        assert await device.read(device.info.size - 5, 5) == b"56789"


async def test_file_system_without_direct_access_falls_back_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse_file(tmp_path / "a.img")
    monkeypatch.setattr(linux, "direct_alignment", lambda descriptor: 0)
    monkeypatch.setattr(linux, "is_in_memory", lambda descriptor: False)
    async with await open_device(f"file://{path}") as device:
        assert device.info.block_size == 1

    with pytest.raises(DeviceUnavailableError, match="leave cache=direct out"):
        await open_device(f"file://{path}?cache=direct")


async def test_file_that_shrinks_while_open_is_an_error_and_not_zeroes(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a.img")
    async with await open_device(f"file://{path}") as device:
        os.truncate(path, MIB)
        with pytest.raises(DeviceError, match="shrunk"):
            await device.read(2 * MIB, 4096)


async def test_file_of_another_kind_is_refused_with_a_hint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DeviceUnavailableError, match="not a regular file"):
        await open_device(f"file://{tmp_path}/pipe")
    with pytest.raises(DeviceUnavailableError, match="not a regular file"):
        await open_device("file:///dev/null")
    with pytest.raises(DeviceUnavailableError, match="not a block device"):
        await open_device("block:///dev/null")
    path = sparse_file(tmp_path / "a.img")
    with pytest.raises(DeviceUnavailableError, match=f"write file://{path}"):
        await open_device(f"block://{path}")


async def test_block_device_named_as_a_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    with ExitStack() as stack:
        url = block(512)(stack, tmp_path).url.replace("block:", "file:")
        with pytest.raises(DeviceUnavailableError, match=f"write block://{tmp_path}/by-id"):
            await open_device(url)


async def test_memory_of_another_size_is_refused_with_both_numbers() -> None:
    name = next(_memory_names)
    async with await open_device(f"memory:{name}?size=1M", create=True):
        pass
    with pytest.raises(
        DeviceUnavailableError, match=r"has 1048576 bytes \(1M\), the URL says 2097152 \(2M\)"
    ):
        await open_device(f"memory:{name}?size=2M", create=True)


async def test_nbd_server_that_is_read_only_is_refused(tmp_path: Path) -> None:
    with (
        nbdkit(unix_listener(tmp_path / "nbd"), "--readonly", "memory", "1M"),
        pytest.raises(DeviceUnavailableError, match="read-only") as caught,
    ):
        await open_device(f"nbd+unix:///?socket={tmp_path}/nbd")

    assert caught.value.error_number == errno.EROFS


async def test_nbd_server_that_dies_is_an_error_of_the_device(tmp_path: Path) -> None:
    with nbdkit(unix_listener(tmp_path / "nbd"), "memory", "1M") as server:
        async with await open_device(f"nbd+unix:///?socket={tmp_path}/nbd") as device:
            server.kill()
            server.wait(TIMEOUT_S)

            with pytest.raises(DeviceError) as caught:
                await device.read(0, 4096)

            assert caught.value.error_number == errno.ECONNRESET
            with pytest.raises(DeviceError, match="open the device anew"):
                await device.read(0, 4096)


async def test_nbd_error_of_the_server_leaves_the_connection_usable(tmp_path: Path) -> None:
    arguments = ("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=1")
    with nbdkit(unix_listener(tmp_path / "nbd"), *arguments):
        async with await open_device(f"nbd+unix:///?socket={tmp_path}/nbd") as device:
            with pytest.raises(DeviceError) as caught:
                await device.write(0, b"x")
            assert caught.value.error_number == errno.ENOSPC

            assert await device.read(0, 1) == b"\0"


async def test_nbd_request_cancelled_midway_leaves_a_device_that_says_so(tmp_path: Path) -> None:
    with nbdkit(unix_listener(tmp_path / "nbd"), "--filter=delay", "memory", "1M", "rdelay=600"):
        async with await open_device(f"nbd+unix:///?socket={tmp_path}/nbd") as device:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.read, 0, 4096)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()

            with pytest.raises(DeviceError, match="open the device anew"):
                await device.write(0, b"x")
            with pytest.raises(DeviceError, match="open the device anew"):
                device.detach()


async def test_nbd_server_that_never_greets_is_given_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    with (
        unix_listener(tmp_path / "nbd"),
        pytest.raises(DeviceError, match=r"negotiation got no answer") as caught,
    ):
        await open_device(f"nbd+unix:///?socket={tmp_path}/nbd")

    assert caught.value.error_number == errno.ETIMEDOUT


async def test_nbd_host_that_does_not_resolve_is_refused_in_one_line() -> None:
    with pytest.raises(DeviceUnavailableError, match="does not resolve") as caught:
        await open_device("nbd://host.invalid/vol")

    assert caught.value.error_number == errno.EHOSTUNREACH


async def test_open_device_of_a_malformed_url_touches_nothing() -> None:
    with pytest.raises(DeviceUrlError):
        await open_device("file://srv/a.img?size=1M", create=True)
