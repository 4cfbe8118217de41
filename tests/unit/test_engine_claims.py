"""Overlapping requests run one after the other, in the order they came, on all legs alike."""

import pytest

from proxy.engine import LegRole, OpKind
from tests.sim.rig import Rig, pattern

KIB = 1024


def two_legs() -> Rig:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    return rig


def test_overlapping_writes_run_in_order_of_arrival_on_every_leg() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    cookies = [client.write(4 * KIB * place, pattern(12 * KIB, place + 1)) for place in range(3)]
    for place in range(3):
        rig.pump()
        assert [rig.engine.data(op.number) for op in rig.file_ops()] == [pattern(12 * KIB, place + 1)] * 2
        # The legs finish in different order; the next one waits for both.
        rig.carry_out(rig.op(1 + place % 2))
        rig.pump()
        assert len(rig.file_ops()) == 1
        rig.carry_out(rig.file_ops()[0])
    rig.pump()
    assert client.order == cookies
    assert rig.legs[1].read(0, 64 * KIB) == rig.legs[2].read(0, 64 * KIB)


def test_read_waits_for_a_write_that_came_before_it() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    read = client.read(0, 8 * KIB)
    rig.pump()
    rig.carry_out(rig.op(1))
    rig.pump()
    assert rig.file_ops(kind=OpKind.READ) == []
    rig.run()
    assert client.replies[read].payload == pattern(4 * KIB) + bytes(4 * KIB)


def test_write_waits_for_a_read_that_came_before_it() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    read = client.read(0, 8 * KIB)
    client.write(0, pattern(4 * KIB))
    rig.pump()
    assert rig.file_ops(kind=OpKind.WRITE) == []
    rig.run()
    assert client.replies[read].payload == bytes(8 * KIB)


def test_reads_share() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    for _ in range(4):
        client.read(0, 8 * KIB)
    rig.pump()
    assert len(rig.file_ops(1)) == 4


def test_read_does_not_overtake_a_write_that_waits() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    first = client.read(0, 4 * KIB)
    write = client.write(0, pattern(4 * KIB))
    second = client.read(0, 4 * KIB)
    rig.pump()
    assert len(rig.file_ops()) == 1
    rig.run()
    assert client.order == [first, write, second]
    assert client.replies[second].payload == pattern(4 * KIB)


def test_requests_side_by_side_do_not_wait() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    for place in range(8):
        client.write(4 * KIB * place, pattern(4 * KIB, place))
    rig.pump()
    assert len(rig.file_ops()) == 16


def test_same_bytes_of_two_disks_do_not_wait() -> None:
    from proxy.extentmap import Range

    rig = two_legs()
    rig.install(1, 2, disks=[(0, Range(0, 32 * KIB)), (1, Range(32 * KIB, 32 * KIB))])
    rig.engine.release()
    for disk in (0, 1):
        rig.connect(disk).write(0, pattern(4 * KIB))
    rig.pump()
    assert len(rig.file_ops()) == 4


def test_flush_waits_for_nobody() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    flush = client.flush()
    rig.pump()
    for op in rig.file_ops(kind=OpKind.SYNC):
        rig.carry_out(op)
    rig.pump()
    assert client.error(flush) == 0


@pytest.mark.parametrize("kind", ["zero", "trim"])
def test_zero_and_trim_claim_as_writes_do(kind: str) -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    first = client.write(0, pattern(8 * KIB))
    second = getattr(client, kind)(0, 4 * KIB)
    third = client.read(0, 8 * KIB)
    rig.pump()
    assert set(rig.counts()) == {OpKind.WRITE}
    rig.run()
    assert client.order == [first, second, third]
    assert client.replies[third].payload == bytes(4 * KIB) + pattern(8 * KIB)[4 * KIB :]


def test_claims_of_clients_meet() -> None:
    rig = two_legs()
    one = rig.start(1, 2)
    other = rig.connect()
    one.write(0, pattern(4 * KIB, 1))
    rig.pump()
    other.write(0, pattern(4 * KIB, 2))
    rig.pump()
    assert len(rig.file_ops()) == 2
    rig.run()
    assert rig.legs[1].read(0, 4 * KIB) == rig.legs[2].read(0, 4 * KIB) == pattern(4 * KIB, 2)


def test_wide_claim_meets_narrow_ones_in_both_orders() -> None:
    size = 16 << 20
    rig = Rig()
    rig.add_leg(1, (size,), transfer_max=size)
    client = rig.start(1)
    first = client.write(8 << 20, pattern(4 * KIB))
    wide = client.zero(0, size)
    last = client.write(12 << 20, pattern(4 * KIB, 2))
    rig.pump()
    assert set(rig.counts()) == {OpKind.WRITE}
    assert len(rig.file_ops()) == 1
    rig.run()
    assert client.order == [first, wide, last]
    assert rig.legs[1].read(8 << 20, 4 * KIB) == bytes(4 * KIB)
    assert rig.legs[1].read(12 << 20, 4 * KIB) == pattern(4 * KIB, 2)


def test_claims_of_long_chains_all_get_their_turn() -> None:
    rig = two_legs()
    client = rig.start(1, (2, LegRole.SYNCING))
    cookies = []
    for place in range(60):
        cookies.append(client.write(place % 5 * 512, pattern(700, place)))
        cookies.append(client.read(place % 7 * 512, 1024))
    rig.run()
    assert sorted(client.order) == cookies
    assert all(client.error(cookie) == 0 for cookie in cookies)
    assert rig.engine.statistics().waited > 60
    assert rig.legs[1].read(0, 64 * KIB) == rig.legs[2].read(0, 64 * KIB)
