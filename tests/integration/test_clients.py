"""Real clients at the door: what nbdinfo, nbdcopy, qemu-io, qemu-img and fio see of a disk."""

import json
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.integration.site import Site, Witness, site

NEEDED = ("nbdinfo", "nbdcopy", "qemu-io", "qemu-img", "fio")
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
async def made() -> AsyncIterator[Site]:
    async with site() as started:
        await started.make(server=None, disk_size="64M")
        yield started


async def run(*command: str, cwd: Path | None = None) -> str:
    """The output of a command that succeeds."""
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, cwd=cwd)
    assert done.returncode == 0, (command, done.stdout.decode(), done.stderr.decode())
    return done.stdout.decode()


async def test_nbdinfo_sees_what_the_disk_offers(made: Site) -> None:
    export = json.loads(await run("nbdinfo", "--json", "--no-content", made.uri()))["exports"][0]
    assert export["export-name"] == "disk1"
    assert export["export-size"] == 64 << 20
    assert export["can_multi_conn"] and export["can_flush"] and export["can_fua"]
    assert export["can_trim"] and export["can_zero"]
    assert not export["is_read_only"]
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (512, 4096)
    assert export["block_size_maximum"] == 32 << 20


async def test_nbdinfo_list_names_every_disk(made: Site) -> None:
    await made.order("POST", "/domains/vol1/disks", name="disk2", size="1M")
    listed = json.loads(await run("nbdinfo", "--list", "--json", made.uri(disk="")))
    assert {export["export-name"] for export in listed["exports"]} == {"disk1", "disk2"}


@pytest.mark.slow
async def test_disk_new_reads_as_zeroes_also_where_another_was_before(made: Site) -> None:
    await run("qemu-io", "-f", "raw", "-c", "write -P 0xaa 0 64M", made.uri())
    await made.order("DELETE", "/domains/vol1/disks/disk1")
    await made.order("POST", "/domains/vol1/disks", name="disk3", size="140M")
    await run("qemu-io", "-f", "raw", "-c", "read -P 0 0 140M", made.uri(disk="disk3"))


async def test_nbdcopy_several_connections_copies_there_and_back(made: Site, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * (16 << 12) + bytes(48 << 20))
    await run("nbdcopy", "--connections=4", "--requests=32", str(image), made.uri())
    back = tmp_path / "back"
    await run("nbdcopy", "--connections=4", made.uri(), str(back))
    assert back.read_bytes() == image.read_bytes()


async def test_qemu_img_converts_compares_and_survives_a_failover_between(made: Site, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"standfast" * 100_000 + bytes(3) + bytes(1 << 20))
    await run("truncate", "-s", "64M", str(image))
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), made.uri())
    await made.order("POST", "/domains/vol1/failover")
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), made.uri())


async def test_qemu_io_every_kind_of_request_has_its_effect(made: Site) -> None:
    commands = [
        "write -P 1 0 1M",
        "write -f -P 2 1M 64k",
        "write -P 3 513 1000",
        "write -z 256k 128k",
        "write -z 700001 7001",
        "discard 0 64k",
        "flush",
        "read -P 0 0 64k",
        "read -P 1 64k 192k",
        "read -P 0 256k 128k",
        "read -P 0 700001 7001",
        "read -P 1 700000 1",
        "read -P 1 707002 1000",
        "read -P 2 1M 64k",
    ]
    # Unaligned requests come from a client that was never told of a smallest block.
    plain = f"driver=nbd,server.type=unix,server.path={made.socket()},export=disk1"
    await run("qemu-io", "-c", "write -P 1 0 1M", "--image-opts", plain)
    output = await run(
        "qemu-io", "-f", "raw", *(part for one in commands for part in ("-c", one)), made.uri()
    )
    assert "Pattern verification failed" not in output


async def test_qemu_io_largest_request_passes(made: Site) -> None:
    output = await run(
        "qemu-io", "-f", "raw", "-c", "write -P 9 4096 32M", "-c", "read -P 9 4096 32M", made.uri()
    )
    assert "Pattern verification failed" not in output


@pytest.mark.slow
async def test_fio_verifies_on_four_connections(made: Site, tmp_path: Path) -> None:
    output = await run(
        *(
            "fio",
            "--name=v",
            "--ioengine=nbd",
            f"--uri={made.uri()}",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
        ),
        *("--numjobs=4", "--size=16m", "--offset_increment=16m", "--verify=crc32c", "--do_verify=1"),
        *("--verify_fatal=1", "--verify_state_save=0", "--output-format=json"),
        cwd=tmp_path,
    )
    jobs = json.loads(output[output.index("{") :])["jobs"]
    assert len(jobs) == 4
    assert all(job["error"] == 0 and job["read"]["total_ios"] == 4096 for job in jobs)


async def test_tcp_door_serves_when_asked_for(made: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"file://{made.images}/gamma1?size=50M"
    await made.order("POST", "/groups", name="gamma", devices=[url])
    await made.order("POST", "/domains", name="vol2", size="20M", active="gamma", listen=f"127.0.0.1:{port}")
    await made.order("POST", "/domains/vol2/disks", name="disk1", size="20M")
    shown = await made.order("GET", "/domains/vol2/disks/disk1")
    assert shown["nbd_tcp_uri"] == f"nbd://127.0.0.1:{port}/disk1"
    assert (await run("nbdinfo", "--size", shown["nbd_tcp_uri"])).strip() == str(20 << 20)
    taken = await made.refused(
        "POST", "/domains", name="vol3", size="10M", active="gamma", listen=f"127.0.0.1:{port}"
    )
    assert "in use" in taken
    assert [domain["name"] for domain in await made.order("GET", "/domains")] == ["vol1", "vol2"]


@pytest.mark.slow
async def test_resize_new_clients_see_the_new_size_and_zeroes_beyond_the_old(made: Site) -> None:
    await run("qemu-io", "-f", "raw", "-c", "write -P 5 0 64M", made.uri())
    await made.order("POST", "/domains/vol1/disks/disk1/resize", size="100M")
    assert (await run("nbdinfo", "--size", made.uri())).strip() == str(100 << 20)
    await run("qemu-io", "-f", "raw", "-c", "read -P 5 0 64M", "-c", "read -P 0 64M 36M", made.uri())
    assert "cannot shrink" in await made.refused("POST", "/domains/vol1/disks/disk1/resize", size="10M")


GARBAGE: list[tuple[str, bytes]] = [
    ("bad magic", b"\xff" * 28),
    ("an http request", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4),
    ("a reply's magic", struct.pack(">IHHQQI", 0x67446698, 0, 0, 1, 0, 4096)),
    ("half a header", b"\x25\x60\x95"),
    ("a write without its payload", struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 1 << 20) + bytes(100)),
    ("a huge write", struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 0xFFFFFFFF) + bytes(5000)),
]


async def test_garbage_of_one_client_costs_only_its_own_connection(made: Site) -> None:
    witness = Witness(made.socket())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.run)
        for what, data in GARBAGE:
            for _ in range(20):
                stranger = await Witness(made.socket()).connect()
                await stranger.send_all(data)
                await stranger.aclose()
            before = witness.answered
            with trio.fail_after(20):
                while witness.answered < before + 500:
                    await trio.sleep(0.01)
            assert witness.connections == 1, what
        nursery.cancel_scope.cancel()


REFUSED: list[tuple[str, tuple[int, int, int, int], int]] = [
    ("a read past the end", (0, 0, 64 << 20, 512), 22),
    ("a write past the end", (0, 1, (64 << 20) - 512, 1024), 28),
    ("offset and length that overflow", (0, 0, (1 << 64) - 512, 1024), 22),
    ("an unknown command", (0, 99, 0, 0), 22),
    ("an unknown flag", (1 << 9, 0, 0, 512), 22),
    ("a read of more than is offered", (0, 0, 0, (32 << 20) + 512), 22),
    ("a flush with a length", (0, 3, 0, 512), 22),
    ("a cache request", (0, 5, 0, 512), 22),
]


async def test_wrong_request_is_answered_with_an_error_and_the_connection_goes_on(made: Site) -> None:
    stream = await Witness(made.socket()).connect()
    async with stream:
        for what, (flags, command, offset, length), error in REFUSED:
            payload = bytes(length) if command == 1 else b""
            await stream.send_all(
                struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length) + payload
            )
            await stream.send_all(struct.pack(">IHHQQI", 0x25609513, 0, 0, 8, 0, 512))
            assert await two_answers(stream) == {7: error, 8: 0}, what


async def two_answers(stream: trio.SocketStream) -> dict[int, int]:
    """The errors of two answers by cookie; number 8 is a read of 512 bytes."""
    answers: dict[int, int] = {}
    data = b""
    while len(answers) < 2:
        data += await stream.receive_some(65536)
        while len(data) >= 16:
            _, code, cookie = struct.unpack_from(">IIQ", data)
            size = 16 + (512 if cookie == 8 and code == 0 else 0)
            if len(data) < size:
                break
            answers[cookie] = code
            data = data[size:]
    return answers


@pytest.mark.slow
async def test_thousand_connections_more_are_turned_away_and_the_others_served(made: Site) -> None:
    witness = Witness(made.socket())
    streams = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.run)
        for _ in range(1030):
            try:
                streams.append(await Witness(made.socket()).connect())
            except (OSError, trio.BrokenResourceError, EOFError):
                break
        before = witness.answered
        with trio.fail_after(20):
            while witness.answered < before + 500:
                await trio.sleep(0.01)
        for stream in streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()
    await witness.check_all()
    assert subprocess.run(["nbdinfo", "--size", made.uri()], capture_output=True).returncode == 0
