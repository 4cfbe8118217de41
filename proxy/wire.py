"""The control channel between the manager and a domain server: framing and message forms. Pure.

A frame is a JSON object and, behind it, raw bytes (extent maps, which JSON would triple)::

    u32 length of the JSON | u32 length of the bytes | JSON | bytes

    manager to server   {"id": 7, "op": "hold", ...}
    server to manager   {"id": 7, "result": {...}}   or   {"id": 7, "error": {...}}
                        {"event": "device-lost", ...}

Both ends are this software at one version, and neither sends what the other does not expect; the
limits are against a foreign client of the socket, not a tuning.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_HEADER = struct.Struct(">II")

#: A domain of some thousand disks has an install message of some hundred KB of JSON.
JSON_MAX = 64 << 20
#: 16 legs' worth of a million extents, 20 bytes each.
BYTES_MAX = 1 << 30


class WireError(Exception):
    """What came is no frame of this channel; the connection is of no further use."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: ``body`` as JSON knows it, ``payload`` raw."""

    body: dict[str, Any]
    payload: bytes = b""

    def encode(self) -> bytes:
        """The frame as it goes over the socket."""
        text = json.dumps(self.body, separators=(",", ":")).encode()
        return _HEADER.pack(len(text), len(self.payload)) + text + self.payload


class Decoder:
    """Puts frames together from pieces of any length."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes | bytearray) -> Iterator[Frame]:
        """The frames that ``data`` completes.

        Raises:
            WireError: what came is no frame.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            json_length, payload_length = _HEADER.unpack_from(self._buffer)
            if json_length > JSON_MAX or payload_length > BYTES_MAX:
                raise WireError(f"a frame of {json_length} + {payload_length} bytes")
            end = _HEADER.size + json_length + payload_length
            if len(self._buffer) < end:
                return
            text = bytes(self._buffer[_HEADER.size : _HEADER.size + json_length])
            payload = bytes(self._buffer[_HEADER.size + json_length : end])
            del self._buffer[:end]
            try:
                body = json.loads(text)
            except ValueError as error:
                raise WireError(f"not JSON: {error}") from None
            if not isinstance(body, dict):
                raise WireError("not a JSON object")
            yield Frame(body, payload)
