"""Copying the active leg to a syncing one while clients go on."""

import errno

import pytest

from proxy.engine import EventKind, LegRole, OpKind
from proxy.extentmap import Range
from tests.sim.rig import DEADLINE_NS, Rig, pattern

KIB = 1024
MIB = 1024 * KIB
SYNCING = LegRole.SYNCING


def rig_to_copy(size: int = 64 * KIB, **options: bool) -> Rig:
    """Leg 1 with a content, leg 2 with another one, syncing, of other geometry."""
    rig = Rig()
    rig.add_leg(1, (size // 2, size // 2), **options).fill(pattern(size))
    rig.add_leg(2, (size,), **options).fill(pattern(size, 99))
    rig.start(1, (2, SYNCING))
    return rig


def copied(rig: Rig) -> list[tuple[int, int, int]]:
    return [(event.leg, event.code, event.a) for event in rig.take_events(EventKind.COPIED)]


def test_copy_makes_the_leg_equal_and_durable_before_it_says_so() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    while not rig.file_ops(2, kind=OpKind.SYNC):
        rig.pump()
        for op in rig.file_ops():
            if op.kind is not OpKind.SYNC:
                rig.carry_out(op)
    assert copied(rig) == []
    rig.run()
    assert copied(rig) == [(2, 0, 64 * KIB)]
    assert rig.legs[2].read(0, 64 * KIB) == pattern(64 * KIB)
    medium = rig.legs[2].devices[0].medium
    assert medium.durable == medium.content


def test_copy_is_of_the_ranges_asked_for_and_shows_its_progress() -> None:
    rig = rig_to_copy()
    assert rig.engine.copy_progress(2) is None
    rig.engine.copy_leg(2, [(0, 4 * KIB, 8 * KIB), (0, 40 * KIB, 4 * KIB)])
    assert rig.engine.copy_progress(2) == (0, 12 * KIB)
    rig.run()
    assert rig.engine.copy_progress(2) is None
    assert copied(rig) == [(2, 0, 12 * KIB)]
    old, new = pattern(64 * KIB, 99), pattern(64 * KIB)
    expected = old[: 4 * KIB] + new[4 * KIB : 12 * KIB] + old[12 * KIB : 40 * KIB] + new[40 * KIB : 44 * KIB]
    assert rig.legs[2].read(0, 64 * KIB) == expected + old[44 * KIB :]


def test_copy_of_nothing_is_only_a_flush() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [])
    rig.pump()
    assert set(rig.counts()) == {OpKind.SYNC}
    rig.run()
    assert copied(rig) == [(2, 0, 0)]


def test_copy_keeps_zeroes_sparse() -> None:
    rig = rig_to_copy()
    rig.legs[1].fill(bytes(64 * KIB))
    rig.engine.copy_leg(2, [(0, 0, 32 * KIB), (0, 32 * KIB, 32 * KIB)])
    rig.legs[1].fill(b"\x01", 64 * KIB - 1)
    rig.pump()
    rig.carry_out_all(1)
    assert rig.counts(of=lambda op: op.kind) == {OpKind.ALLOCATE: 1, OpKind.WRITE: 1}
    rig.run()
    assert rig.legs[2].read(0, 64 * KIB) == bytes(64 * KIB - 1) + b"\x01"


def test_copy_is_bounded_in_flight() -> None:
    rig = rig_to_copy(16 * MIB)
    rig.engine.copy_leg(2, [(0, 0, 16 * MIB)])
    most = 0
    while rig.engine.copy_progress(2) is not None:
        rig.pump()
        most = max(most, rig.engine.statistics().memory_bytes)
        for op in rig.file_ops()[:1]:
            rig.carry_out(op)
    assert most <= 4 * MIB
    assert copied(rig) == [(2, 0, 16 * MIB)]


def test_copy_waits_for_a_write_under_way_and_takes_what_it_wrote() -> None:
    rig = rig_to_copy()
    (client,) = rig.clients
    write = client.write(8 * KIB, pattern(4 * KIB, 5))
    rig.pump()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    assert rig.file_ops(kind=OpKind.READ) == []
    rig.run()
    assert client.error(write) == 0
    assert rig.legs[2].read(0, 64 * KIB) == rig.legs[1].read(0, 64 * KIB)
    assert rig.legs[2].read(8 * KIB, 4 * KIB) == pattern(4 * KIB, 5)


def test_write_waits_for_a_copy_under_way_so_that_nothing_old_lands_over_it() -> None:
    rig = rig_to_copy()
    (client,) = rig.clients
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    write = client.write(8 * KIB, pattern(4 * KIB, 5))
    elsewhere = client.read(8 * KIB, 4 * KIB)
    rig.pump()
    rig.carry_out_all(1)
    rig.carry_out_all(2, kind=OpKind.WRITE)
    rig.run()
    assert client.error(write) == client.error(elsewhere) == 0
    assert rig.legs[1].read(8 * KIB, 4 * KIB) == pattern(4 * KIB, 5)
    assert rig.legs[2].read(0, 64 * KIB) == rig.legs[1].read(0, 64 * KIB)


def test_copy_and_reads_share() -> None:
    rig = rig_to_copy()
    (client,) = rig.clients
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    read = client.read(0, 4 * KIB)
    rig.pump()
    rig.carry_out(rig.file_ops(1)[-1])
    rig.pump()
    assert client.error(read) == 0


def test_copy_reads_from_whichever_leg_is_active_when_that_changes() -> None:
    rig = rig_to_copy()
    rig.add_leg(3).fill(pattern(64 * KIB))
    rig.install(1, 3, (2, SYNCING))
    rig.engine.copy_leg(2, [(0, 0, 32 * KIB), (0, 32 * KIB, 32 * KIB)])
    rig.pump()
    late = rig.file_ops(1)
    rig.engine.hold()
    rig.engine.fence_leg(1)
    rig.install(3, (2, SYNCING))
    rig.engine.release()
    rig.pump()
    for op in late:
        rig.engine.complete(op.number, op.length, b"\xee" * op.length)
    rig.run()
    assert copied(rig) == [(2, 0, 64 * KIB)]
    assert rig.legs[2].read(0, 64 * KIB) == pattern(64 * KIB)


def test_copy_ends_with_an_error_when_its_leg_is_lost() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    rig.carry_out_all(1)
    rig.fail(rig.op(2))
    rig.pump()
    assert [event.leg for event in rig.take_events(EventKind.DEVICE_ERROR)] == [2]
    rig.engine.hold()
    rig.engine.fence_leg(2)
    rig.install(1)
    rig.engine.release()
    rig.pump()
    assert copied(rig) == [(2, errno.ECANCELED, 0)]
    assert rig.engine.statistics().memory_bytes == 0


def test_copy_ends_with_the_error_of_the_active_leg_when_nothing_is_better() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    for op in rig.file_ops(1):
        rig.fail(op)
    rig.pump()
    rig.engine.fail_parked()
    rig.pump()
    assert copied(rig) == [(2, errno.EIO, 0)]


def test_copy_whose_flush_fails_does_not_say_it_is_done() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [])
    rig.pump()
    rig.fail(rig.op(2))
    rig.carry_out_all(1)
    rig.engine.fail_parked()
    rig.pump()
    assert copied(rig) == [(2, errno.EIO, 0)]


def test_copy_waits_while_the_domain_holds() -> None:
    rig = rig_to_copy()
    rig.engine.hold()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    assert rig.file_ops() == []
    rig.engine.release()
    rig.run()
    assert copied(rig) == [(2, 0, 64 * KIB)]


def test_copy_to_two_legs_goes_on_at_once() -> None:
    rig = rig_to_copy()
    rig.add_leg(3).fill(pattern(64 * KIB, 98))
    rig.install(1, (2, SYNCING), (3, SYNCING))
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.engine.copy_leg(3, [(0, 0, 64 * KIB)])
    rig.run()
    assert sorted(copied(rig)) == [(2, 0, 64 * KIB), (3, 0, 64 * KIB)]
    assert rig.legs[3].read(0, 64 * KIB) == rig.legs[2].read(0, 64 * KIB) == pattern(64 * KIB)


def test_copy_of_a_disk_that_is_removed_meanwhile_ends_well() -> None:
    rig = rig_to_copy()
    rig.install(1, (2, SYNCING), disks=[(0, Range(0, 32 * KIB)), (1, Range(32 * KIB, 32 * KIB))])
    rig.engine.hold()
    rig.engine.copy_leg(2, [(0, 0, 32 * KIB), (1, 0, 32 * KIB)])
    rig.install(1, (2, SYNCING), disks=[(0, Range(0, 32 * KIB))])
    rig.engine.release()
    rig.run()
    assert copied(rig) == [(2, 0, 32 * KIB)]


def test_copy_of_a_disk_that_shrinks_meanwhile_stays_within_its_map_and_does_not_say_it_is_done() -> None:
    rig = rig_to_copy()
    rig.engine.hold()
    rig.engine.copy_leg(2, [(0, 0, 16 * KIB), (0, 24 * KIB, 24 * KIB), (0, 48 * KIB, 16 * KIB)])
    rig.install(1, (2, SYNCING), disks=[(0, Range(0, 32 * KIB))])
    rig.engine.release()
    rig.run()
    assert copied(rig) == [(2, errno.ENOSPC, 16 * KIB)]


def test_copy_of_a_disk_whose_last_block_is_not_whole_copies_it_all() -> None:
    rig = rig_to_copy()
    rig.install(1, (2, SYNCING), size=61 * KIB + 512)
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.run()
    assert copied(rig) == [(2, 0, 64 * KIB)]
    assert rig.legs[2].read(0, 64 * KIB) == pattern(64 * KIB)


def test_copy_that_is_over_does_not_outlive_its_leg() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    rig.carry_out_all(1)
    rig.fail(rig.op(2))
    rig.pump()
    rig.engine.hold()
    rig.engine.fence_leg(2)
    rig.pump()
    rig.install(1)
    rig.engine.close_leg(2)
    rig.pump()
    # The group comes back as another leg, and may well get the place of the old one.
    rig.add_leg(7).fill(pattern(64 * KIB, 99))
    rig.install(1, (7, SYNCING))
    rig.engine.copy_leg(7, [(0, 0, 64 * KIB)])
    rig.engine.release()
    rig.run()
    assert copied(rig) == [(2, errno.ECANCELED, 0), (7, 0, 64 * KIB)]
    assert rig.legs[7].read(0, 64 * KIB) == pattern(64 * KIB)


def test_copy_that_waits_while_its_domain_is_held_does_not_outlive_its_leg() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    rig.engine.hold()
    rig.fail(rig.op(1, 0, OpKind.READ))
    rig.carry_out_all(1)
    rig.install(1)
    rig.engine.fence_leg(2)
    rig.engine.close_leg(2)
    rig.pump()
    assert [event.leg for event in rig.take_events(EventKind.LEG_FORGOTTEN)] == [2]


@pytest.mark.parametrize("leg", [1, 3])
def test_copy_to_a_leg_that_is_not_syncing_is_refused(leg: int) -> None:
    rig = rig_to_copy()
    rig.add_leg(3)
    with pytest.raises(OSError, match="Invalid"):
        rig.engine.copy_leg(leg, [(0, 0, 4 * KIB)])


def test_second_copy_to_one_leg_is_refused() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 4 * KIB)])
    with pytest.raises(OSError, match="busy"):
        rig.engine.copy_leg(2, [(0, 0, 4 * KIB)])


@pytest.mark.parametrize("extent", [(0, 512, 4096), (0, 0, 512), (0, 0, 0), (0, -4096, 4096)])
def test_copy_of_less_than_whole_blocks_is_refused(extent: tuple[int, int, int]) -> None:
    rig = rig_to_copy()
    with pytest.raises(ValueError, match="whole blocks"):
        rig.engine.copy_leg(2, [extent])


def test_copy_survives_a_full_arena() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=32 * MIB)
    rig.add_leg(2, (64 * MIB,), transfer_max=32 * MIB)
    client = rig.start(1, (2, SYNCING))
    second = rig.connect()
    reads = [client.read(0, 32 * MIB), second.read(0, 32 * MIB)]
    rig.pump()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.run()
    assert [client.error(reads[0]), second.error(reads[1])] == [0, 0]
    assert copied(rig) == [(2, 0, 64 * KIB)]


def test_copy_from_a_hanging_leg_is_evidence() -> None:
    rig = rig_to_copy()
    rig.engine.copy_leg(2, [(0, 0, 64 * KIB)])
    rig.pump()
    rig.pass_time(2 * DEADLINE_NS / 1e9)
    assert {event.leg for event in rig.take_events(EventKind.DEADLINE_MISSED)} == {1}
