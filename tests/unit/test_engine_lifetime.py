"""What is given to the engine, and when it lets go of it: descriptors, maps, memory."""

import errno
import gc
import os
import weakref
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engine import DeviceKind, DeviceSpec, EventKind, LegRole, OpKind
from tests.sim.rig import Leg, RemoteDevice, Rig, is_open, new_descriptor, new_engine, pattern

KIB = 1024
MIB = 1024 * KIB


def spec(descriptor: int, **changes: int) -> DeviceSpec:
    return DeviceSpec(
        **{
            "fd": descriptor,
            "kind": DeviceKind.FILE,
            "block_size": 512,
            "transfer_max": MIB,
            "in_memory": False,
            "can_flush": True,
            "can_fua": True,
            "can_zero": True,
            **changes,
        }  # type: ignore[arg-type]
    )


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# --- Legs -----------------------------------------------------------------------------------------


def kinds(rig: Rig) -> list[EventKind]:
    return [e.kind for e in rig.take_events(EventKind.LEG_CLOSED, EventKind.LEG_FORGOTTEN)]


@pytest.mark.parametrize("remote", [False, True])
def test_closed_leg_keeps_its_descriptors_until_its_operations_are_over(remote: bool) -> None:
    rig = Rig()
    leg = rig.add_leg(1, (32 * KIB, 32 * KIB), remote=remote)
    rig.add_leg(2)
    client = rig.start(1, 2)
    client.write(28 * KIB, pattern(8 * KIB))
    rig.pump()
    late = rig.file_ops(1)
    rig.engine.hold()
    rig.engine.close_leg(1)
    rig.run_leg(2)
    if not remote:  # streams are cut instead
        assert kinds(rig) == []
        for op in late:
            assert is_open(op.fd)
            rig.carry_out(op)
        rig.pump()
    assert kinds(rig) == [EventKind.LEG_CLOSED]
    assert not any(is_open(device.fd) for device in leg.devices)
    rig.install(2)
    rig.engine.release()
    rig.run()
    assert kinds(rig) == [EventKind.LEG_FORGOTTEN]
    with pytest.raises(KeyError):
        rig.engine.fence_leg(1)
    assert len(client.replies) == 1


def test_leg_that_no_map_names_is_gone_at_once() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (32 * KIB, 32 * KIB))
    rig.engine.close_leg(1)
    rig.pump()
    assert [event.kind for event in rig.take_events() if event.leg == 1] == [
        EventKind.LEG_DRAINED,
        EventKind.LEG_CLOSED,
        EventKind.LEG_FORGOTTEN,
    ]
    assert not any(is_open(device.fd) for device in leg.devices)


def test_leg_is_not_forgotten_before_its_last_map_is_retired() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1, 2)
    client.read(0, 512)
    rig.pump()
    rig.install(1)
    rig.engine.close_leg(2)
    rig.pump()
    assert kinds(rig) == [EventKind.LEG_CLOSED]
    rig.run()
    assert kinds(rig) == [EventKind.LEG_FORGOTTEN]


def test_id_of_a_closed_leg_can_be_used_again() -> None:
    rig = Rig()
    for _ in range(40):
        rig.add_leg(1, remote=True)
        rig.engine.close_leg(1)
        rig.pump()
        assert kinds(rig) == [EventKind.LEG_CLOSED, EventKind.LEG_FORGOTTEN]


def test_leg_that_is_known_already_is_refused_and_its_descriptors_closed() -> None:
    engine = new_engine()
    engine.add_leg(1, [spec(new_descriptor())])
    descriptors = [new_descriptor(), new_descriptor()]
    with pytest.raises(ValueError, match="known already"):
        engine.add_leg(1, [spec(descriptor) for descriptor in descriptors])
    assert not any(is_open(descriptor) for descriptor in descriptors)


def test_more_legs_than_there_are_places_are_refused_and_their_descriptors_closed() -> None:
    engine = new_engine()
    for leg in range(16):
        engine.add_leg(leg, [spec(new_descriptor())])
    descriptor = new_descriptor()
    with pytest.raises(OSError, match="16"):
        engine.add_leg(16, [spec(descriptor)])
    assert not is_open(descriptor)


def test_sixteen_legs_of_which_all_but_one_hang_still_serve() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    for leg_id in range(1, 16):
        client.read(0, 512)
        rig.pump()
        assert len(rig.file_ops(leg_id)) == leg_id
        rig.engine.hold()
        rig.engine.fence_leg(leg_id)
        rig.pump()
        rig.add_leg(leg_id + 1)
        rig.install(leg_id + 1)
        rig.engine.release()
        rig.pump()
    rig.run_leg(16)
    assert len(client.replies) == 15


def test_stop_of_everything_leaves_no_descriptor() -> None:
    gc.collect()
    before = open_descriptors()
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2, remote=True)
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    client.write(8 * KIB, pattern(4 * KIB))
    rig.pump()
    client.ended = errno.ECONNRESET
    rig.run()
    rig.engine.close_leg(1)
    rig.engine.close_leg(2)
    rig.pump()
    del rig, client
    gc.collect()
    assert open_descriptors() == before


def test_engine_let_go_of_with_legs_and_clients_leaves_no_descriptor() -> None:
    gc.collect()
    before = open_descriptors()
    rig = Rig()
    rig.add_leg(1, (32 * KIB, 32 * KIB))
    rig.add_leg(2, remote=True)
    rig.start(1, 2)
    rig.pump()
    del rig
    gc.collect()
    assert open_descriptors() == before


# --- Maps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    offsets: "array[int]"
    devices: "array[int]"
    device_offsets: "array[int]"


def table(offsets: list[int], devices: list[int], device_offsets: list[int]) -> Table:
    return Table(array("Q", offsets), array("I", devices), array("Q", device_offsets))


def test_arrays_of_a_map_are_let_go_when_it_is_retired() -> None:
    rig = Rig()
    rig.add_leg(1)

    class Column(array):  # type: ignore[type-arg]
        pass

    offsets = Column("Q", [0, 64 * KIB])
    reference = weakref.ref(offsets)
    extents = Table(offsets, array("I", [0]), array("Q", [8192]))
    rig.engine.install(1, [(1, LegRole.ACTIVE)], [(0, 64 * KIB, [extents])])
    rig.generation = 1
    del offsets, extents
    gc.collect()
    assert reference() is not None
    rig.install(1)
    rig.pump()
    gc.collect()
    assert reference() is None
    assert [event.generation for event in rig.take_events(EventKind.MAP_RETIRED)] == [1]


GOOD = table([0, 65536], [0], [8192])


@pytest.mark.parametrize(
    ("legs", "disks"),
    [
        pytest.param([], [(0, 65536, [])], id="no leg"),
        pytest.param([(1, LegRole.BACKUP)], [(0, 65536, [GOOD])], id="no active leg"),
        pytest.param(
            [(1, LegRole.ACTIVE), (2, LegRole.ACTIVE)], [(0, 65536, [GOOD, GOOD])], id="two active legs"
        ),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65536, [])], id="no table"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65536, [GOOD, GOOD])], id="too many tables"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65537, [GOOD])], id="table too short"),
        pytest.param([(1, LegRole.ACTIVE)], [(1, 65536, [GOOD]), (0, 65536, [GOOD])], id="order"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65536, [GOOD]), (0, 65536, [GOOD])], id="twice"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65536, [table([0, 65536], [1], [0])])], id="no such device"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 65536, [table([0, 65536], [0, 0], [0])])], id="columns"),
        pytest.param([(1, LegRole.ACTIVE)], [(0, 0, [table([0], [], [])])], id="empty"),
    ],
)
def test_map_that_is_no_map_is_refused_and_changes_nothing(
    legs: list[tuple[int, LegRole]], disks: list[tuple[int, int, list[Table]]]
) -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1)
    with pytest.raises(ValueError):  # noqa: PT011
        rig.engine.install(9, legs, disks)
    cookie = client.write(0, pattern(512))
    rig.run()
    assert client.error(cookie) == 0
    assert rig.engine.statistics().generation == 1


def test_map_of_an_unknown_leg_or_an_old_generation_is_refused() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.start(1)
    with pytest.raises(KeyError):
        rig.engine.install(2, [(7, LegRole.ACTIVE)], [(0, 65536, [GOOD])])
    for generation in (0, 1):
        with pytest.raises(ValueError, match="newer"):
            rig.engine.install(generation, [(1, LegRole.ACTIVE)], [(0, 65536, [GOOD])])


def test_blocks_larger_than_the_largest_are_refused() -> None:
    rig = Rig()
    rig.add_leg(1, block_size=8192)
    with pytest.raises(ValueError, match="8192"):
        rig.install(1)


# --- Memory ---------------------------------------------------------------------------------------

operations = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 4 * MIB - 1), st.integers(1, MIB)),
        st.tuples(st.just("write"), st.integers(0, 4 * MIB - 1), st.integers(1, 200 * KIB)),
        st.tuples(st.just("finish"), st.integers(0, 63), st.just(0)),
        st.tuples(st.just("fail over"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(operations)
def test_memory_of_requests_never_overlaps_and_all_comes_back(steps: list[tuple[str, int, int]]) -> None:
    """Buffers are what requests hold: were two of them to share a byte, a write would carry another's data."""
    rig = Rig()
    rig.add_leg(1, (4 * MIB,), transfer_max=4 * MIB)
    client = rig.start(1)
    active = 1
    content = bytearray(4 * MIB)
    for number, (kind, a, b) in enumerate(steps):
        length = min(b, 4 * MIB - a)
        if kind == "read":
            client.read(a, length)
        elif kind == "write":
            data = pattern(length, number % 90)
            client.write(a, data)
            content[a : a + length] = data
        elif kind == "finish" and rig.file_ops(active):
            ops = rig.file_ops(active)
            rig.carry_out(ops[a % len(ops)])
        elif kind == "fail over" and active < 12:
            leg = rig.add_leg(active + 1, (4 * MIB,), transfer_max=4 * MIB)
            leg.fill(rig.legs[active].read(0, 4 * MIB))
            rig.engine.hold()
            rig.engine.fence_leg(active)
            active += 1
            rig.install(active)
            rig.engine.release()
        rig.pump()
    # Legs that were fenced answer last, with garbage.
    rig.run_leg(active)
    for op in rig.file_ops():
        result = op.length if op.kind in (OpKind.READ, OpKind.WRITE) else 0
        rig.engine.complete(op.number, result, b"\xee" * op.length if op.kind is OpKind.READ else b"")
    rig.run()
    assert all(reply.error == 0 for reply in client.replies.values())
    assert rig.legs[active].read(0, 4 * MIB) == bytes(content)
    assert rig.engine.statistics().memory_bytes == 0


def test_closing_a_leg_cuts_its_streams() -> None:
    rig = Rig()
    leg: Leg = rig.add_leg(1, remote=True)
    rig.engine.close_leg(1)
    rig.pump()
    (server,) = leg.devices
    assert isinstance(server, RemoteDevice)
    assert server.shut
    assert not is_open(server.fd)
