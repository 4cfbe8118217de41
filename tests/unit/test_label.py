"""The label: what is written comes back, and whatever else is there is refused for what it is."""

from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import label as label_module
from proxy.errors import RefusedError
from proxy.label import (
    LABEL_SIZE,
    Label,
    LabelDamagedError,
    LabelMismatchError,
    LabelMissingError,
    LabelStaleError,
    LabelVersionError,
    check_label,
    data_offset_for,
    label_of,
)
from proxy.model import ALLOCATION_UNIT, Device, DeviceId, Group, GroupId, Layout, LayoutKind
from proxy.sizes import GIB, KIB, MIB, SIZE_MAX

URL = "file:///srv/a1.img"
OTHER_UUID = UUID(int=99)

LABEL = Label(
    device_uuid=UUID(int=11),
    group_uuid=UUID(int=1),
    group_name="alpha",
    position=1,
    device_count=3,
    device_size=50 * MIB,
    data_offset=64 * KIB,
    map_generation=7,
)

labels = st.builds(
    Label,
    device_uuid=st.uuids(),
    group_uuid=st.uuids(),
    group_name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    position=st.integers(0, 2**32 - 1),
    device_count=st.integers(0, 2**32 - 1),
    device_size=st.integers(0, SIZE_MAX),
    data_offset=st.integers(0, SIZE_MAX),
    map_generation=st.integers(0, 2**64 - 1),
)


def altered(block: bytes, offset: int, data: bytes) -> bytes:
    """``block`` with ``data`` put at ``offset``."""
    return block[:offset] + data + block[offset + len(data) :]


@given(labels)
def test_label_encoded_and_decoded_is_the_same(label: Label) -> None:
    block = label.encode()

    assert len(block) == LABEL_SIZE
    assert Label.decode(block, url=URL) == label


def test_label_encoding_stays_as_it_is_on_the_devices_in_use() -> None:
    block = LABEL.encode()

    assert block[:12] == b"STANDFST\x01\x00\x00\x00"
    assert block[12:28].hex() == "bfb6af55e4ad4e415a5ac51e22ca7391"
    assert block[60:124] == b"alpha".ljust(64, b"\0")
    assert block[124:132] == b"\x01\0\0\0\x03\0\0\0"
    assert block[156:] == bytes(LABEL_SIZE - 156)


@pytest.mark.parametrize("block", [bytes(LABEL_SIZE), b"\xebX\x90mkfs.fat".ljust(LABEL_SIZE)])
def test_label_of_a_device_without_one_is_missing_and_not_damaged(block: bytes) -> None:
    with pytest.raises(LabelMissingError, match="has no label") as caught:
        Label.decode(block, url=URL)

    assert URL in str(caught.value)


@given(st.integers(8, LABEL_SIZE - 1), st.integers(1, 255))
def test_label_with_any_byte_changed_behind_the_magic_is_damaged(offset: int, change: int) -> None:
    block = LABEL.encode()

    with pytest.raises(LabelDamagedError, match="damaged"):
        Label.decode(altered(block, offset, bytes([block[offset] ^ change])), url=URL)


def test_label_torn_in_the_middle_is_damaged() -> None:
    old, new = LABEL.encode(), replace(LABEL, map_generation=8).encode()

    with pytest.raises(LabelDamagedError):
        Label.decode(new[:140] + old[140:], url=URL)


def test_label_of_a_later_version_is_refused_naming_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(label_module, "VERSION", 2)
        block = LABEL.encode()

    with pytest.raises(LabelVersionError, match=r"version 2, this software knows version 1"):
        Label.decode(block, url=URL)


def test_label_with_a_name_that_is_not_text_is_decoded_all_the_same() -> None:
    forged = altered(LABEL.encode(), 60, b"\xff")
    forged = altered(forged, 12, label_module._checksum(forged))

    assert Label.decode(forged, url=URL) == replace(LABEL, group_name="\ufffdlpha")


def test_check_label_of_the_expected_device_passes_even_when_it_grew() -> None:
    check_label(LABEL, LABEL, least_generation=0, url=URL, size=LABEL.device_size)
    check_label(LABEL, LABEL, least_generation=0, url=URL, size=2 * LABEL.device_size)
    check_label(LABEL, replace(LABEL, map_generation=8), least_generation=0, url=URL, size=LABEL.device_size)


def test_check_label_older_than_the_store_is_stale() -> None:
    with pytest.raises(LabelStaleError, match="generation 8 at least, found 7"):
        check_label(
            LABEL, replace(LABEL, map_generation=9), least_generation=8, url=URL, size=LABEL.device_size
        )


def test_check_label_of_a_renamed_group_passes() -> None:
    check_label(
        LABEL, replace(LABEL, group_name="renamed"), least_generation=0, url=URL, size=LABEL.device_size
    )


@pytest.mark.parametrize(
    ("found", "size", "named"),
    [
        (
            replace(LABEL, group_uuid=OTHER_UUID, group_name="beta"),
            50 * MIB,
            ["'alpha'", "'beta'", str(OTHER_UUID)],
        ),
        (replace(LABEL, position=2), 50 * MIB, ["position 1", "position 2"]),
        (replace(LABEL, device_uuid=OTHER_UUID), 50 * MIB, [str(LABEL.device_uuid), str(OTHER_UUID)]),
        (replace(LABEL, device_count=2), 50 * MIB, ["3 devices", "one of 2"]),
        (replace(LABEL, device_size=49 * MIB), 50 * MIB, [str(50 * MIB), str(49 * MIB)]),
        (replace(LABEL, data_offset=MIB), 50 * MIB, [str(64 * KIB), str(MIB)]),
        (LABEL, 50 * MIB - 1, [str(50 * MIB), str(50 * MIB - 1), "shrunk"]),
        (replace(LABEL, map_generation=8), 50 * MIB, ["map generation 7", "found 8"]),
    ],
    ids=["group", "position", "device", "count", "size", "data-offset", "shrunk", "generation"],
)
def test_check_label_of_another_device_is_refused_naming_expected_and_found(
    found: Label, size: int, named: list[str]
) -> None:
    with pytest.raises(LabelMismatchError) as caught:
        check_label(found, LABEL, least_generation=0, url=URL, size=size)

    message = str(caught.value)
    assert message.startswith(f"{URL}: expected ")
    assert "\n" not in message
    for words in named:
        assert words in message


def test_label_of_a_stored_device_has_every_field_of_it() -> None:
    devices = tuple(
        Device(DeviceId(i), UUID(int=10 + i), i, 50 * MIB, 64 * KIB, f"file:///srv/a{i}.img")
        for i in range(3)
    )
    group = Group(GroupId(1), UUID(int=1), "alpha", Layout(LayoutKind.LINEAR), devices)

    assert label_of(group, devices[1], map_generation=7) == LABEL


@pytest.mark.parametrize(
    ("device_size", "data_offset"),
    [
        (128 * KIB, 64 * KIB),
        (50 * MIB, 64 * KIB),
        (GIB - 1, 64 * KIB),
        (GIB, MIB),
        (SIZE_MAX, MIB),
    ],
)
def test_data_offset_is_a_mebibyte_from_a_gibibyte_on(device_size: int, data_offset: int) -> None:
    assert data_offset_for(device_size, url=URL) == data_offset
    assert data_offset % ALLOCATION_UNIT == 0
    assert data_offset >= LABEL_SIZE


@pytest.mark.parametrize("device_size", [0, LABEL_SIZE, 128 * KIB - 1])
def test_data_offset_of_too_small_a_device_is_refused_with_the_arithmetic(device_size: int) -> None:
    with pytest.raises(RefusedError, match=r"64K for the label and 64K for data make 128K") as caught:
        data_offset_for(device_size, url=URL)

    assert f"a device of {device_size} bytes" in str(caught.value)
