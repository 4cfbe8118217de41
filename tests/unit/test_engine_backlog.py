"""Asynchronous legs: answered by the active leg alone, sent to the others in order, and waited for where it counts."""

import errno
from random import Random

import pytest

from proxy.engine import EventKind, LegRole, OpKind, RequestKind
from tests.sim.rig import Client, RemoteDevice, Rig, pattern
from tests.sim.wire import Flag

KIB = 1024
BLOCK = 4 * KIB
SIZE = 256 * KIB
ROUND_S = 4.1


def rig_of(
    *legs: int, backlog: int = 64 * KIB, block_sizes: dict[int, int] | None = None
) -> tuple[Rig, Client]:
    """Legs of one content, the first one active, with a bitmap that marks 16 regions."""
    rig = Rig()
    for leg in legs:
        rig.add_leg(leg, (SIZE,), block_size=(block_sizes or {}).get(leg, 512)).fill(pattern(SIZE))
    rig.open_bitmap(SIZE)
    rig.install(*legs, backlog=backlog)
    rig.engine.release()
    return rig, rig.connect()


def write(rig: Rig, client: Client, offset: int, data: bytes) -> int:
    """Write, with the active leg and the bitmap at work and no other; the answer is there."""
    cookie = client.write(offset, data)
    run_active(rig)
    assert client.error(cookie) == 0
    return cookie


def run_active(rig: Rig, leg: int = 1) -> None:
    assert rig.bitmap is not None
    rig.pump()
    while ops := [op for op in rig.file_ops() if op in rig.file_ops(leg) or op.fd == rig.bitmap.fd]:
        for op in ops:
            rig.carry_out(op)
        rig.pump()


def offsets(rig: Rig, leg: int) -> list[int]:
    """Where the writes lie that are under way on a leg."""
    base = next(iter(rig.legs[leg].map.pieces(0, 1))).device_offset
    return [op.offset - base for op in rig.file_ops(leg, kind=OpKind.WRITE)]


def test_write_is_answered_when_the_active_leg_has_it_and_reaches_the_other_later() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    assert rig.legs[2].read(0, BLOCK) == pattern(SIZE)[:BLOCK]
    assert rig.engine.backlog(2)[0] == BLOCK and rig.engine.backlog(1) == (0, 0)
    rig.run()
    assert rig.legs[2].read(0, BLOCK) == pattern(BLOCK, 5)
    assert rig.engine.backlog(2) == (0, 0)
    assert rig.engine.statistics().memory_bytes == 0


def test_age_of_the_backlog_is_that_of_its_oldest() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.engine.now_ns += 100_000_000
    rig.pump()
    write(rig, client, BLOCK, pattern(BLOCK, 6))
    count, age_ns = rig.engine.backlog(2)
    assert count == 2 * BLOCK and age_ns >= 100_000_000


def test_writes_one_after_the_other_are_under_way_together_on_the_other_leg() -> None:
    rig, client = rig_of(1, 2)
    for place in range(4):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
    assert offsets(rig, 2) == [place * BLOCK for place in range(4)]


def test_overlapping_writes_keep_their_order() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    write(rig, client, 512, pattern(BLOCK, 6))
    assert len(rig.file_ops(2)) == 1
    rig.run()
    assert rig.legs[2].read(0, 2 * BLOCK) == rig.legs[1].read(0, 2 * BLOCK)


def test_write_after_one_with_fua_waits_for_it_and_all_before() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    fua = client.write(BLOCK, pattern(BLOCK, 6), Flag.FUA)
    run_active(rig)
    assert client.error(fua) == 0
    write(rig, client, 2 * BLOCK, pattern(BLOCK, 7))
    assert offsets(rig, 2) == [0, BLOCK]
    first, second = rig.file_ops(2)
    assert (first.flags, bool(second.flags)) == (0, True)
    rig.carry_out(second)
    rig.pump()
    assert offsets(rig, 2) == [0]
    rig.carry_out(first)
    rig.pump()
    assert offsets(rig, 2) == [2 * BLOCK]


def test_flush_is_answered_by_the_active_leg_and_keeps_its_place_on_the_other() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    flush = client.flush()
    run_active(rig)
    assert client.error(flush) == 0
    write(rig, client, BLOCK, pattern(BLOCK, 6))
    kinds = []
    while ops := rig.file_ops(2):
        assert len(ops) == 1
        kinds.append(ops[0].kind)
        rig.carry_out(ops[0])
        rig.pump()
    assert kinds == [OpKind.WRITE, OpKind.SYNC, OpKind.WRITE]


@pytest.mark.parametrize("what", ["zero", "trim", "unaligned zero", "unaligned write"])
def test_other_writes_reach_the_other_leg_as_they_are(what: str) -> None:
    rig, client = rig_of(1, 2, block_sizes={1: 4096, 2: 512})
    ask = {
        "zero": lambda: client.zero(0, 16 * KIB),
        "trim": lambda: client.trim(0, 16 * KIB),
        "unaligned zero": lambda: client.zero(700, 9 * KIB),
        "unaligned write": lambda: client.write(700, pattern(9 * KIB, 3)),
    }
    cookie = ask[what]()
    run_active(rig)
    assert client.error(cookie) == 0
    assert rig.legs[2].read(0, SIZE) == pattern(SIZE)
    rig.run()
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE) != pattern(SIZE)
    assert rig.engine.statistics().memory_bytes == 0


def test_hold_is_drained_only_when_every_leg_has_what_was_answered() -> None:
    rig, client = rig_of(1, 2, 3)
    for place in range(4):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
    rig.engine.hold((1, 2, 3))
    rig.pump()
    rig.run_leg(2)
    assert not rig.take_events(EventKind.DRAINED)
    rig.run_leg(3)
    assert rig.take_events(EventKind.DRAINED)
    for leg in (2, 3):
        assert rig.legs[leg].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_hold_is_drained_when_the_leg_it_is_for_has_what_was_answered_and_the_other_goes_on_behind_it() -> (
    None
):
    rig, client = rig_of(1, 2, 3)
    for place in range(4):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
    number = rig.engine.hold()
    rig.pump()
    (drained,) = rig.take_events(EventKind.DRAINED)
    assert drained.a == number
    rig.engine.hold((2,))
    rig.pump()
    assert not rig.take_events(EventKind.DRAINED)
    rig.run_leg(2)
    assert rig.take_events(EventKind.DRAINED)
    rig.engine.fence_leg(1)
    rig.install(2, 3, away=(1,), backlog=64 * KIB)
    rig.engine.release()
    overwritten = client.write(0, pattern(BLOCK, 9))
    run_active(rig, 2)
    assert client.error(overwritten) == 0
    assert rig.legs[3].read(0, SIZE) == pattern(SIZE)
    rig.run()
    assert not rig.take_events(EventKind.LEG_BEHIND)
    assert rig.legs[3].read(0, SIZE) == rig.legs[2].read(0, SIZE)
    assert rig.legs[3].read(0, BLOCK) == pattern(BLOCK, 9)
    assert rig.engine.statistics().memory_bytes == 0


def test_failover_takes_along_what_the_other_leg_had_yet_to_get() -> None:
    rig, client = rig_of(1, 2)
    for place in range(3):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
    pending = client.write(8 * BLOCK, pattern(BLOCK, 9))
    rig.pump()
    rig.engine.hold((2,))
    rig.engine.fence_leg(1)
    rig.run_leg(2)
    assert rig.take_events(EventKind.DRAINED)
    rig.install(2, away=(1,), backlog=64 * KIB)
    rig.engine.release()
    run_active(rig, 2)
    assert client.error(pending) == 0
    read = client.read(0, 9 * BLOCK)
    run_active(rig, 2)
    assert client.replies[read].payload == b"".join(
        [
            *(pattern(BLOCK, place) for place in range(3)),
            pattern(SIZE)[3 * BLOCK : 8 * BLOCK],
            pattern(BLOCK, 9),
        ]
    )


def test_leg_that_takes_too_little_falls_behind_and_clients_go_on() -> None:
    rig, client = rig_of(1, 2, backlog=16 * KIB)
    for place in range(4):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
    assert not rig.take_events(EventKind.LEG_BEHIND)
    write(rig, client, 4 * BLOCK, pattern(BLOCK, 4))
    (event,) = rig.take_events(EventKind.LEG_BEHIND)
    assert (event.leg, event.a) == (2, 4 * BLOCK)
    write(rig, client, 5 * BLOCK, pattern(BLOCK, 5))
    assert not rig.take_events(EventKind.LEG_BEHIND)
    rig.run()
    assert rig.engine.backlog(2) == (0, 0)
    assert rig.engine.statistics().memory_bytes == 0
    assert rig.legs[2].read(5 * BLOCK, BLOCK) == pattern(SIZE)[5 * BLOCK : 6 * BLOCK]


def test_slowest_leg_falls_behind_and_the_other_keeps_up() -> None:
    rig, client = rig_of(1, 2, 3, backlog=16 * KIB)
    for place in range(8):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
        rig.run_leg(3)
    (event,) = rig.take_events(EventKind.LEG_BEHIND)
    assert event.leg == 2
    assert rig.legs[3].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_what_a_leg_behind_lacks_stays_marked_until_it_is_brought_back() -> None:
    rig, client = rig_of(1, 2, backlog=16 * KIB)
    for place in range(6):
        write(rig, client, place * 32 * KIB, pattern(BLOCK, place))
    assert rig.take_events(EventKind.LEG_BEHIND)
    assert rig.bitmap is not None
    for _ in range(4):
        rig.pass_time(ROUND_S)
        rig.run()
    assert rig.engine.dirty_bytes(0, away=False) > 0
    rig.engine.hold()
    rig.engine.fence_leg(2)
    rig.run()
    rig.install(1, away=(2,), backlog=16 * KIB)
    rig.engine.release()
    assert rig.engine.dirty_bytes(2, away=True) >= 6 * BLOCK


def test_error_of_the_other_leg_is_told_and_no_client_hears_of_it() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.fail(rig.op(2))
    rig.pump()
    events = rig.take_events(EventKind.DEVICE_ERROR, EventKind.LEG_BEHIND)
    assert [event.kind for event in events] == [EventKind.DEVICE_ERROR, EventKind.LEG_BEHIND]
    write(rig, client, BLOCK, pattern(BLOCK, 6))
    assert rig.file_ops(2) == []


def remote_backup() -> tuple[Rig, Client, RemoteDevice]:
    """The other leg is an NBD server."""
    rig = Rig()
    rig.add_leg(1, (SIZE,)).fill(pattern(SIZE))
    (server,) = rig.add_leg(2, (SIZE,), remote=True).devices
    assert isinstance(server, RemoteDevice)
    rig.open_bitmap(SIZE)
    rig.install(1, 2, backlog=64 * KIB)
    rig.engine.release()
    return rig, rig.connect(), server


def test_server_of_the_other_leg_that_shuts_down_has_not_got_the_write() -> None:
    rig, client, server = remote_backup()
    write(rig, client, 0, pattern(BLOCK, 5))
    server.answer(server.commands[0], errno.ESHUTDOWN)
    rig.pump()
    assert rig.take_events(EventKind.LEG_BEHIND)
    for _ in range(4):
        rig.pass_time(ROUND_S)
        rig.run()
    assert rig.marked(0)


def test_one_write_larger_than_the_backlog_is_kept_all_the_same() -> None:
    rig, client = rig_of(1, 2, 3, backlog=16 * KIB)
    write(rig, client, 0, pattern(BLOCK))
    write(rig, client, 64 * KIB, pattern(36 * KIB, 2))
    assert not rig.take_events(EventKind.LEG_BEHIND)
    write(rig, client, 0, pattern(BLOCK))
    assert [event.leg for event in rig.take_events(EventKind.LEG_BEHIND)] == [2, 3]


def test_of_flushes_that_wait_only_the_last_is_carried_out() -> None:
    rig, client = rig_of(1, 2, backlog=1 << 20)
    for place in range(10):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
        flush = client.flush()
        run_active(rig)
        assert client.error(flush) == 0
    rig.run()
    assert sum(device.flushes for device in rig.engine.device_statistics(2)) == 1
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_leg_that_is_copied_to_gets_writes_in_no_order_but_that_of_overlaps() -> None:
    rig = Rig()
    for leg in (1, 2):
        rig.add_leg(leg, (SIZE,))
    rig.open_bitmap(SIZE)
    rig.install((1, LegRole.ACTIVE), (2, LegRole.SYNCING), backlog=64 * KIB)
    rig.engine.release()
    client = rig.connect()
    for place in range(3):
        write(rig, client, place * BLOCK, pattern(BLOCK, place))
        flush = client.flush()
        run_active(rig)
        assert client.error(flush) == 0
    assert len(offsets(rig, 2)) == 3


def test_verify_waits_only_for_what_it_is_about() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 128 * KIB, pattern(BLOCK, 5))
    rig.engine.verify([(0, 0, 64 * KIB)])
    rig.pump()
    while reads := rig.file_ops(kind=OpKind.READ):
        for op in reads:
            rig.carry_out(op)
        rig.pump()
    report = rig.engine.verify_report()
    assert report is not None and (report.running, report.compared) == (False, 64 * KIB)


def test_giving_up_to_a_leg_ends_copies_of_what_it_lacks() -> None:
    rig = Rig()
    for leg in (1, 2, 3):
        rig.add_leg(leg, (SIZE,)).fill(pattern(SIZE))
    rig.open_bitmap(SIZE)
    rig.engine.fill_plane(2)
    rig.engine.fill_plane(3)
    rig.run()
    rig.install(1, (3, LegRole.SYNCING), away=(2,), backlog=64 * KIB)
    rig.engine.release()
    rig.engine.copy_leg(3, [(0, 0, SIZE)])
    rig.pump()
    while rest := [op for op in rig.file_ops() if op.kind is not OpKind.SYNC]:
        for op in rest:
            rig.carry_out(op)
        rig.pump()
    flushes = rig.file_ops(3, kind=OpKind.SYNC)
    assert flushes
    rig.engine.hold()
    _, written = rig.engine.give_up_to(2)
    while not written:
        for op in rig.bitmap_ops():
            rig.carry_out(op)
        rig.engine.step()
        lacking, written = rig.engine.give_up_to(2)
    assert lacking[0] == 0xF
    for op in flushes:
        rig.carry_out(op)
    rig.run()
    assert rig.marked(3) == {0, 1, 2, 3}
    (copied,) = rig.take_events(EventKind.COPIED)
    assert copied.code == errno.ECANCELED


def test_round_clears_no_mark_before_the_other_leg_has_the_write() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    for _ in range(4):
        rig.pass_time(ROUND_S)
        run_active(rig)
    assert rig.marked(0)
    rig.run()
    for _ in range(3):
        rig.pass_time(ROUND_S)
        rig.run()
    assert rig.marked(0) == set()


def test_flush_of_our_own_waits_for_the_backlog_also_while_clients_are_held() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.engine.hold()
    token = rig.engine.submit(RequestKind.FLUSH)
    run_active(rig)
    assert not rig.take_events(EventKind.DONE)
    rig.run()
    (done,) = rig.take_events(EventKind.DONE)
    assert (done.a, done.code) == (token, 0)
    assert rig.legs[2].read(0, BLOCK) == pattern(BLOCK, 5)


def test_zero_of_our_own_is_done_when_every_leg_has_it() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.engine.submit(RequestKind.ZERO, 0, 0, 16 * KIB)
    run_active(rig)
    assert not rig.take_events(EventKind.DONE)
    rig.run()
    assert rig.take_events(EventKind.DONE)
    assert rig.legs[2].read(0, 16 * KIB) == rig.legs[1].read(0, 16 * KIB) == bytes(16 * KIB)


def test_verify_finds_no_difference_in_what_is_on_its_way() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.engine.verify([(0, 0, SIZE)])
    run_active(rig)
    rig.run()
    report = rig.engine.verify_report()
    assert report is not None and not report.running
    assert (report.compared, report.mismatched) == (SIZE, 0)


def test_read_that_the_active_leg_cannot_do_is_answered_from_the_other_once_it_has_all() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    read = client.read(0, BLOCK)
    rig.pump()
    rig.fail(rig.op(1))
    run_active(rig)
    assert client.error(read) is None
    rig.run()
    assert client.replies[read].payload == pattern(BLOCK, 5)


def test_leg_that_is_copied_to_gets_what_is_written_meanwhile() -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,)).fill(pattern(SIZE))
    rig.add_leg(2, (SIZE,))
    rig.open_bitmap(SIZE)
    rig.engine.fill_plane(2)
    rig.install((1, LegRole.ACTIVE), (2, LegRole.SYNCING), backlog=64 * KIB)
    rig.engine.release()
    client = rig.connect()
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    random = Random(4)
    for version in range(40):
        client.write(random.randrange(60) * BLOCK, pattern(BLOCK, version))
        rig.pump()
        for op in rig.file_ops():
            if random.random() < 0.5:
                rig.carry_out(op)
        rig.pump()
    rig.run()
    (copied,) = rig.take_events(EventKind.COPIED)
    assert copied.code == 0
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_stop_of_a_disk_takes_its_part_of_the_backlog_along() -> None:
    rig, client = rig_of(1, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    write(rig, client, BLOCK, pattern(BLOCK, 6))
    rig.install(1, 2, disks=[], backlog=64 * KIB)
    rig.run()
    assert rig.engine.backlog(2) == (0, 0)
    assert rig.engine.statistics().backlog == 0
    assert not rig.take_events(EventKind.LEG_BEHIND)


@pytest.mark.parametrize("seed", range(12))
def test_other_leg_is_always_what_the_active_one_could_be_after_a_loss_of_power(seed: int) -> None:
    """What is on it in spite of a flush that was answered before it began has all before that flush beside it."""
    random = Random(seed)
    rig, client = rig_of(1, 2, backlog=16 * SIZE)
    assert rig.bitmap is not None
    asked: dict[int, tuple[int, int]] = {}  # place -> version, cookie
    places: dict[int, int] = {}
    flushes: dict[int, set[int]] = {}  # cookie -> what it covers
    needs: dict[int, set[int]] = {}
    answered: set[int] = set()
    flushed: set[int] = set()
    for version in range(1, 300):
        for place, (number, cookie) in list(asked.items()):
            if client.error(cookie) is not None:
                answered.add(number)
                del asked[place]
        for cookie in [one for one in flushes if client.error(one) is not None]:
            flushed |= flushes.pop(cookie)
        place = random.randrange(SIZE // BLOCK)
        if random.random() < 0.1:
            flushes[client.flush()] = set(answered)
        elif place not in asked:
            needs[version], places[version] = set(flushed), place
            fua = Flag.FUA if random.random() < 0.1 else Flag.NONE
            data = version.to_bytes(4, "little") * (BLOCK // 4)
            asked[place] = (version, client.write(place * BLOCK, data, fua))
            if fua:
                flushes[asked[place][1]] = {version}
        rig.pump()
        for op in rig.file_ops():
            if op.fd == rig.bitmap.fd or random.random() < (0.5 if op in rig.file_ops(1) else 0.2):
                rig.carry_out(op)
        rig.pump()
        latest = {
            place: int.from_bytes(rig.legs[2].read(place * BLOCK, 4), "little")
            for place in range(SIZE // BLOCK)
        }
        for number in set(latest.values()) & set(needs):
            for earlier in needs[number]:
                found = latest[places[earlier]]
                assert found in places and found >= earlier, f"{number} is there and {earlier} is not"
    rig.run()
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_read_that_is_repaired_waits_for_no_other_leg_than_the_one_it_is_read_from() -> None:
    rig, client = rig_of(1, 3, 2)
    write(rig, client, 0, pattern(BLOCK, 5))
    rig.run_leg(3)
    read = client.read(0, BLOCK)
    rig.pump()
    rig.fail(rig.op(1), errno.EIO)
    rig.pump()
    rig.run_leg(3)
    assert client.replies[read].payload == pattern(BLOCK, 5)
    assert rig.file_ops(2)
