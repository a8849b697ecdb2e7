"""Small messages that become large when parsed: as many fields as fit into a number of bytes.

Knows protobuf's wire format and the contracts' field numbers; sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from google.protobuf.message import Message

from outrider.v1 import draft_pb2, orchestrator_pb2, target_pb2

# Makes a message of about the given number of bytes.
Bomb = Callable[[int], bytes]


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def of_length(number: int, data: bytes) -> bytes:
    """A field whose value has a length: a message, a text, bytes or packed numbers."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def nested(data: bytes, *path: int) -> bytes:
    """The field at the path's end; the first number is the outermost message's."""
    for number in reversed(path):
        data = of_length(number, data)
    return data


def _many(item: bytes, *path: int) -> Bomb:
    """The item again and again, in the message at the path."""
    return lambda num_bytes: nested(item * (num_bytes // len(item)), *path)


def _spread(number: int, item: bytes) -> Bomb:
    """Few in each of many messages."""
    part = of_length(number, item * 20)
    return lambda num_bytes: part * (num_bytes // len(part))


_EMPTY = tuple(of_length(number, b"") for number in range(17))
_BOMBS: Mapping[type[Message], Mapping[str, Bomb]] = {
    target_pb2.VerifyRequest: {
        "opens": _many(_EMPTY[1]),
        "rows": _many(_EMPTY[2]),
        "closes": _many(_EMPTY[3]),
        "forget_session_ids": _many(_EMPTY[4]),
        "9": _many(_EMPTY[9]),
        "opens.sampling.stop": _many(_EMPTY[8], 1, 7),
        "opens.sampling.logit_bias": _many(_EMPTY[14], 1, 7),
        "opens.sampling": _many(nested(b"", 1, 7)),
    },
    draft_pb2.ProposeRequest: {
        "opens": _many(_EMPTY[1]),
        "commits": _many(_EMPTY[2]),
        "opens.sampling": _many(nested(b"", 1, 7)),
        "opens.sampling.allowed_token_ids": _many(b"\x80\x01\x01", 1, 7),
        "opens.sampling.logit_bias": _spread(1, nested(b"", 7, 14)),
    },
    orchestrator_pb2.GenerateRequest: {
        "chat.messages": _many(_EMPTY[1], 3),
        "token_ids.ids": _many(b"\x08\x01", 2),
        "sampling.stop": _many(_EMPTY[8], 4),
        "sampling.logit_bias": _many(_EMPTY[14], 4),
        "sampling.stop_token_ids": _many(b"\x48\x01", 4),
        # One after the other in the same place, of which the parser keeps what it made.
        "token_ids": _many(_EMPTY[2] + _EMPTY[3]),
    },
}


def bombs(kind: type[Message]) -> Mapping[str, Bomb]:
    """By the path of what is repeated."""
    return _BOMBS[kind]
