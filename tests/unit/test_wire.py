"""The control channel's framing: whole, byte by byte, and against what is no frame."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import BYTES_MAX, JSON_MAX, Decoder, Frame, WireError

BODIES = st.dictionaries(
    st.text(max_size=8), st.integers() | st.text() | st.none() | st.booleans(), max_size=4
)


@given(st.lists(st.tuples(BODIES, st.binary(max_size=50)), max_size=5), st.integers(1, 40))
def test_decoder_any_pieces_gives_the_frames_that_went_in(
    messages: list[tuple[dict[str, object], bytes]], piece: int
) -> None:
    frames = [Frame(body, payload) for body, payload in messages]
    data = b"".join(frame.encode() for frame in frames)
    decoder = Decoder()
    found = [
        frame
        for start in range(0, len(data), piece)
        for frame in decoder.receive(data[start : start + piece])
    ]
    assert found == frames


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">II", JSON_MAX + 1, 0),
        struct.pack(">II", 2, BYTES_MAX + 1),
        struct.pack(">II", 3, 0) + b"{{{",
        struct.pack(">II", 2, 0) + b"[]",
        struct.pack(">II", 1, 0) + b"\xff",
    ],
    ids=["json too long", "bytes too long", "no json", "no object", "no text"],
)
def test_decoder_garbage_raises(data: bytes) -> None:
    with pytest.raises(WireError):
        list(Decoder().receive(data))
