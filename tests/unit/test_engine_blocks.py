"""Requests that are not made of whole blocks: read, change, write, and never touch a neighbour."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engine import OpKind
from tests.sim.rig import DEVICE_BASE, Rig, pattern
from tests.sim.wire import Flag

KIB = 1024
SIZE = 32 * KIB


def rig_of_blocks(block_size: int, *, other_block_size: int | None = None) -> Rig:
    """Two legs of equal content, extents that end at 8 and 12 KiB of the first one."""
    rig = Rig()
    rig.add_leg(1, (8 * KIB, 4 * KIB, 20 * KIB), block_size=block_size).fill(pattern(SIZE))
    rig.add_leg(2, (SIZE,), block_size=other_block_size or block_size).fill(pattern(SIZE))
    rig.start(1, 2)
    return rig


def expect(rig: Rig, offset: int, data: bytes) -> None:
    before = pattern(SIZE)
    for leg in rig.legs.values():
        assert leg.read(0, SIZE) == before[:offset] + data + before[offset + len(data) :]


CASES = [
    (100, 50),  # within one block
    (0, 1),
    (SIZE - 1, 1),
    (511, 2),  # over a border of 512
    (4095, 2),  # over a border of 4096
    (100, 8000),  # both edges, whole blocks between
    (0, 5000),  # last edge only
    (5000, 3192),  # first edge only
    (8 * KIB - 10, 20),  # over a border of extents
    (8 * KIB - 10, 4 * KIB + 20),  # over two
    (8 * KIB + 1, 4 * KIB - 2),  # just inside one
    (1, SIZE - 2),
]


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(("offset", "length"), CASES)
def test_unaligned_write_changes_its_bytes_only(block_size: int, offset: int, length: int) -> None:
    rig = rig_of_blocks(block_size)
    (client,) = rig.clients
    cookie = client.write(offset, pattern(length, 7))
    rig.pump()
    while rig.file_ops():
        for op in rig.file_ops():
            assert op.offset % block_size == op.length % block_size == 0
            rig.carry_out(op)
        rig.pump()
    assert client.error(cookie) == 0
    expect(rig, offset, pattern(length, 7))


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(("offset", "length"), CASES)
def test_unaligned_zero_changes_its_bytes_only(block_size: int, offset: int, length: int) -> None:
    rig = rig_of_blocks(block_size)
    (client,) = rig.clients
    cookie = client.zero(offset, length)
    rig.run()
    assert client.error(cookie) == 0
    expect(rig, offset, bytes(length))


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(("offset", "length"), CASES)
def test_unaligned_trim_changes_at_most_its_bytes_and_alike_on_all_legs(
    block_size: int, offset: int, length: int
) -> None:
    rig = rig_of_blocks(block_size)
    (client,) = rig.clients
    cookie = client.trim(offset, length)
    rig.run()
    assert client.error(cookie) == 0
    first = -(-offset // 4096) * 4096
    last = (offset + length) // 4096 * 4096
    expect(rig, first if first < last else 0, bytes(max(last - first, 0)))


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize(("offset", "length"), CASES)
def test_unaligned_read_brings_exactly_what_was_asked_for(block_size: int, offset: int, length: int) -> None:
    rig = rig_of_blocks(block_size)
    (client,) = rig.clients
    cookie = client.read(offset, length)
    rig.run()
    assert client.replies[cookie].payload == pattern(SIZE)[offset : offset + length]


@pytest.mark.parametrize("kind", ["write", "zero"])
def test_edges_are_read_from_the_active_leg_only(kind: str) -> None:
    rig = rig_of_blocks(512)
    (client,) = rig.clients
    client.write(100, pattern(5000)) if kind == "write" else client.zero(100, 5000)
    rig.pump()
    assert [(op.kind, op.offset, op.length) for op in rig.file_ops(1)] == [
        (OpKind.READ, DEVICE_BASE, 512),
        (OpKind.READ, DEVICE_BASE + 9 * 512, 512),
    ]
    assert rig.file_ops(2) == []


def test_aligned_write_reads_nothing() -> None:
    rig = rig_of_blocks(512)
    (client,) = rig.clients
    client.write(512, pattern(1024))
    rig.pump()
    assert set(rig.counts()) == {OpKind.WRITE}


def test_largest_block_of_any_leg_counts_for_all() -> None:
    rig = rig_of_blocks(512, other_block_size=4096)
    (client,) = rig.clients
    cookie = client.write(512, pattern(512, 7))
    rig.pump()
    assert [op.length for op in rig.file_ops()] == [4096]
    rig.run()
    assert client.error(cookie) == 0
    expect(rig, 512, pattern(512, 7))


@pytest.mark.parametrize("kind", ["write", "zero"])
@pytest.mark.parametrize(("offset", "length"), [(100, 50), (100, 8000), (4095, 2)])
def test_block_that_takes_several_transfers_keeps_its_neighbours(kind: str, offset: int, length: int) -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,), block_size=512, transfer_max=512).fill(pattern(SIZE))
    rig.add_leg(2, (SIZE,), block_size=4096).fill(pattern(SIZE))
    client = rig.start(1, 2)
    data = pattern(length, 7) if kind == "write" else bytes(length)
    cookie = client.write(offset, data) if kind == "write" else client.zero(offset, length)
    rig.run()
    assert client.error(cookie) == 0
    expect(rig, offset, data)


def test_neighbours_in_one_block_do_not_lose_each_other() -> None:
    rig = rig_of_blocks(4096)
    (client,) = rig.clients
    other = rig.connect()
    for place in range(16):
        (client, other)[place % 2].write(256 * place, pattern(256, place + 3))
    rig.run()
    expect(rig, 0, b"".join(pattern(256, place + 3) for place in range(16)))


def test_edge_that_fails_parks_the_write_and_touches_nothing() -> None:
    rig = rig_of_blocks(512)
    (client,) = rig.clients
    cookie = client.write(100, pattern(50, 7))
    rig.pump()
    rig.fail(rig.file_ops(1)[0], errno.ENODEV)
    rig.pump()
    assert rig.file_ops() == []
    rig.engine.hold()
    rig.engine.fence_leg(1)
    rig.install(2)
    rig.engine.release()
    rig.run()
    assert client.error(cookie) == 0
    assert rig.legs[2].read(0, 512) == pattern(SIZE)[:100] + pattern(50, 7) + pattern(SIZE)[150:512]


def test_edges_are_read_again_when_a_write_is_done_again() -> None:
    rig = rig_of_blocks(512)
    (client,) = rig.clients
    cookie = client.write(100, pattern(50, 7))
    rig.pump()
    rig.carry_out_all(1)
    for op in rig.file_ops(2):
        rig.fail(op)
    rig.carry_out_all(1)
    rig.install(1)
    rig.pump()
    assert [op.kind for op in rig.file_ops()] == [OpKind.READ]
    rig.run()
    assert client.error(cookie) == 0


def test_last_block_of_a_disk_that_ends_within_it_can_be_written() -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,), block_size=4096)
    client = rig.start(1, size=SIZE - 3 * KIB)
    cookies = [
        client.write(SIZE - 4 * KIB, pattern(KIB)),
        client.zero(SIZE - 4 * KIB + 10, KIB - 10),
        client.read(SIZE - 4 * KIB, KIB),
    ]
    rig.run()
    assert [client.error(cookie) for cookie in cookies] == [0, 0, 0]
    assert client.replies[cookies[2]].payload == pattern(10) + bytes(KIB - 10)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 512, 4096]),
    st.lists(
        st.tuples(
            st.sampled_from(["write", "zero"]),
            st.integers(0, SIZE - 1),
            st.integers(1, 9000),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_unaligned_requests_at_once_are_as_if_one_after_the_other(
    block_size: int, requests: list[tuple[str, int, int, bool]]
) -> None:
    rig = rig_of_blocks(block_size)
    (client,) = rig.clients
    expected = bytearray(pattern(SIZE))
    cookies = []
    for number, (kind, offset, length, fua) in enumerate(requests):
        length = min(length, SIZE - offset)
        flags = Flag.FUA if fua else Flag.NONE
        data = pattern(length, number + 2) if kind == "write" else bytes(length)
        expected[offset : offset + length] = data
        cookies.append(
            client.write(offset, data, flags) if kind == "write" else client.zero(offset, length, flags)
        )
    rig.run()
    assert all(client.error(cookie) == 0 for cookie in cookies)
    expect(rig, 0, bytes(expected))
