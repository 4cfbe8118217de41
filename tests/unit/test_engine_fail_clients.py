"""The end of patience: clients of a held domain are told errors, until there is a leg again."""

import errno

import pytest

from proxy.engine import EventKind, OpKind, RequestKind
from tests.sim.rig import Client, Rig, pattern

KIB = 1024
BLOCK = 4 * KIB
SIZE = 64 * KIB


def rig_of_two() -> tuple[Rig, Client]:
    rig = Rig()
    for leg in (1, 2):
        rig.add_leg(leg, (SIZE,)).fill(pattern(SIZE))
    return rig, rig.start(1, 2)


def lose_all(rig: Rig) -> None:
    """Hold, and fence every leg with what is under way on it."""
    rig.engine.hold()
    for leg in (1, 2):
        rig.engine.fence_leg(leg)
    rig.pump()


def bring_back(rig: Rig, leg: int) -> None:
    """A new leg, of what was written to the lost one of this number, serves."""
    content = rig.legs[leg].read(0, SIZE)
    rig.add_leg(leg + 10, (SIZE,)).fill(content)
    rig.engine.hold()
    rig.run()
    rig.install(leg + 10)
    rig.engine.release()
    rig.run()


def test_all_that_clients_wait_for_is_answered_with_an_error() -> None:
    rig, client = rig_of_two()
    running = client.write(0, pattern(BLOCK, 1))
    waiting = client.write(0, pattern(BLOCK, 2))
    reading = client.read(8 * BLOCK, BLOCK)
    rig.pump()
    lose_all(rig)
    held = client.read(4 * BLOCK, BLOCK)
    flush = client.flush()
    rig.pump()
    assert not client.replies
    rig.engine.fail_clients()
    rig.pump()
    assert {client.error(one) for one in (running, waiting, reading, held, flush)} == {errno.EIO}
    late = client.write(0, pattern(BLOCK, 3))
    rig.pump()
    assert client.error(late) == errno.EIO
    assert rig.engine.statistics().running == 0


def test_leg_that_returns_is_served_from_and_nothing_that_failed_is_done_again() -> None:
    rig, client = rig_of_two()
    failed = client.write(0, pattern(BLOCK, 1))
    rig.pump()
    lose_all(rig)
    rig.engine.fail_clients()
    rig.run()
    assert client.error(failed) == errno.EIO
    landed = rig.legs[1].read(0, BLOCK)  # late, and of no consequence: this leg was fenced
    bring_back(rig, 2)
    read = client.read(0, BLOCK)
    write = client.write(BLOCK, pattern(BLOCK, 7))
    rig.run()
    assert client.replies[read].payload in (landed, pattern(SIZE)[:BLOCK])
    assert client.error(write) == 0
    assert rig.legs[12].read(BLOCK, BLOCK) == pattern(BLOCK, 7)
    assert rig.engine.statistics().memory_bytes == 0


def test_write_done_on_every_leg_and_not_answered_yet_is_answered_with_an_error_too() -> None:
    rig, client = rig_of_two()
    write = client.write(0, pattern(BLOCK, 1))
    rig.pump()
    rig.engine.hold()
    rig.run()  # done on both legs, and withheld: a failover is being decided
    assert not client.replies
    lose_all(rig)
    rig.engine.fail_clients()
    rig.pump()
    assert client.error(write) == errno.EIO


def test_clients_wait_again_as_soon_as_a_leg_is_on_its_way() -> None:
    rig, client = rig_of_two()
    lose_all(rig)
    rig.engine.fail_clients()
    rig.engine.hold()
    read = client.read(0, BLOCK)
    rig.pump()
    assert not client.replies
    bring_back(rig, 1)
    assert client.replies[read].payload == pattern(SIZE)[:BLOCK]


def test_late_answer_to_what_was_failed_reaches_no_memory_in_use() -> None:
    rig, client = rig_of_two()
    client.read(0, BLOCK)
    rig.pump()
    (op,) = [op for op in rig.file_ops(1) if op.kind is OpKind.READ]
    lose_all(rig)
    rig.engine.fail_clients()
    rig.pump()
    assert rig.engine.statistics().memory_bytes > 0  # the device may still write there
    rig.carry_out(op)
    rig.pump()
    assert rig.engine.statistics().memory_bytes == 0


def test_work_of_the_engines_own_waits_for_a_leg() -> None:
    rig, client = rig_of_two()
    token = rig.engine.submit(RequestKind.ZERO, 0, 0, BLOCK)
    rig.pump()
    lose_all(rig)
    rig.engine.fail_clients()
    rig.run()
    assert not rig.take_events(EventKind.DONE)
    bring_back(rig, 1)
    (done,) = rig.take_events(EventKind.DONE)
    assert (done.a, done.code) == (token, 0)
    read = client.read(0, BLOCK)
    rig.run()
    assert client.replies[read].payload == bytes(BLOCK)


def test_clients_that_are_served_are_told_no_errors() -> None:
    rig, _ = rig_of_two()
    with pytest.raises(RuntimeError, match="being served"):
        rig.engine.fail_clients()


def test_write_that_ends_well_after_all_is_not_acknowledged() -> None:
    rig, client = rig_of_two()
    write = client.write(0, pattern(BLOCK, 1))
    rig.pump()
    rig.engine.hold()
    rig.engine.fail_clients()  # with no leg fenced: it is not for us to say that the record may stay as it is
    rig.run()
    assert client.error(write) == errno.EIO
