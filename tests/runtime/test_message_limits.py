"""Message limits: the check agrees with the parser, and rejects hostile messages."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message

from outrider.errors import InvalidRequest
from outrider.runtime import message_limits as frames
from outrider.runtime.grpc_options import MAX_REQUEST_BYTES
from outrider.runtime.message_limits import (
    MAX_FIELDS,
    MAX_PACKED_BYTES,
    SMALL_BYTES,
    BoundedParser,
    UnparsedRequest,
)
from outrider.v1 import draft_pb2, orchestrator_pb2, sampling_pb2, target_pb2
from tests.fuzz.bombs import bombs, nested, of_length
from tests.fuzz.mutation import Mutator

KINDS: list[type[Message]] = [
    target_pb2.VerifyRequest,
    draft_pb2.ProposeRequest,
    orchestrator_pb2.GenerateRequest,
]
BOMBS = {f"{kind.__name__} {name}": (kind, name) for kind in KINDS for name in bombs(kind)}


def parser(kind: type[Message]) -> BoundedParser:
    return BoundedParser(kind.DESCRIPTOR)


@pytest.mark.parametrize("name", BOMBS)
def test_messages_with_too_many_fields_are_rejected(name: str) -> None:
    """None of these has a megabyte; parsed, the largest would take a hundred."""
    kind, bomb = BOMBS[name]
    data = bombs(kind)[bomb](SMALL_BYTES * 3)
    with pytest.raises(InvalidRequest, match=r"^frame: more than 131072 fields .* in ") as caught:
        parser(kind).parse(data)
    assert caught.value.field == "frame"
    assert bomb.split(".")[0] in str(caught.value)


def test_too_many_packed_numbers_are_rejected() -> None:
    """Each has one byte, and up to eight once parsed."""
    read = parser(orchestrator_pb2.GenerateRequest)
    most = nested(b"\1" * MAX_PACKED_BYTES, 2, 1)
    assert len(read.parse(most).token_ids.ids) == MAX_PACKED_BYTES
    with pytest.raises(InvalidRequest, match=r"^frame: more than 8388608 bytes .*token_ids\.ids"):
        read.parse(nested(b"\1" * (MAX_PACKED_BYTES + 1), 2, 1))
    halves = nested(b"\1" * (MAX_PACKED_BYTES // 2 + 1), 2, 1)
    with pytest.raises(InvalidRequest, match="numbers"):
        read.parse(halves + halves)


async def test_other_tasks_run_while_a_large_request_is_checked() -> None:
    """With the maximum number of fields, and with more."""
    call = orchestrator_pb2.GenerateRequest()
    for _ in range(MAX_FIELDS // 3):
        call.chat.messages.add(role="user", content="x")
    data = call.SerializeToString()
    read, num_turns = parser(orchestrator_pb2.GenerateRequest), 0
    for request, is_refused in ((data, False), (data + data[:9] * 2, True)):
        large = read.begin(request)
        assert isinstance(large, UnparsedRequest)
        parsing = asyncio.create_task(read.finish(large))
        while not parsing.done():
            num_turns += 1
            await asyncio.sleep(0)
        assert isinstance(await parsing, InvalidRequest) == is_refused
        assert is_refused or await parsing == call
    assert num_turns >= 2 * MAX_FIELDS // 4_096


def test_the_largest_valid_messages_are_accepted() -> None:
    """Requests at the limit of every list, and frames with whole contexts."""
    call = orchestrator_pb2.GenerateRequest()
    for number in range(4_096):
        call.chat.messages.add(role="user", content=f"{number} " * 150)
    call.sampling.stop.extend(["x" * 1_024] * 64)
    call.sampling.logit_bias.update(dict.fromkeys(range(1_024), 0.5))
    call.sampling.stop_token_ids.extend(range(4_096))
    call.sampling.allowed_token_ids.extend(range(1 << 20))
    text = orchestrator_pb2.GenerateRequest(text="é" * 4_000_000)
    opening = draft_pb2.DraftOpen(token_ids=bytes(4 * 131_072), sampling=call.sampling)
    frame = draft_pb2.ProposeRequest(opens=[opening], closes=[draft_pb2.DraftClose()] * 16_000)
    row = target_pb2.VerifyRow(context_token_ids=bytes(4 << 20), draft_token_ids=bytes(64))
    for message in (call, text, frame, target_pb2.VerifyRequest(rows=[row] * 4)):
        data = message.SerializeToString()
        assert SMALL_BYTES < len(data) <= MAX_REQUEST_BYTES
        assert parser(type(message)).parse(data) == message


def test_a_request_at_every_limit_of_size_is_accepted() -> None:
    """The size limit of servers leaves room for every list and text of docs/reference/limits.md."""
    wide = "\N{GOTHIC LETTER AHSA}"  # four bytes
    sampling = sampling_pb2.SamplingParams(
        stop=[wide * 1_024] * 64,
        logit_bias=dict.fromkeys(range(1 << 20, (1 << 20) + 1_024), 0.5),
        stop_token_ids=range(1 << 20, (1 << 20) + 4_096),
        allowed_token_ids=range(1 << 20),
    )
    messages = [orchestrator_pb2.ChatMessage(role="r" * 64, content="x")] * 4_095
    last = orchestrator_pb2.ChatMessage(role="r" * 64, content=wide * (4_000_000 - 4_095))
    chat = orchestrator_pb2.ChatMessages(messages=[*messages, last])
    text = orchestrator_pb2.GenerateRequest(text=wide * 4_000_000, sampling=sampling)
    for request in (text, orchestrator_pb2.GenerateRequest(chat=chat, sampling=sampling)):
        data = request.SerializeToString()
        assert len(data) <= MAX_REQUEST_BYTES
        assert parser(orchestrator_pb2.GenerateRequest).parse(data) == request


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_agrees_with_the_parser(
    kind: type[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check accepts what the parser accepts; what it cannot follow the parser rejects."""
    monkeypatch.setattr(frames, "SMALL_BYTES", 0)
    mutator, read, num_refused = Mutator(random.Random(5)), parser(kind), 0
    for number in range(600):
        data = mutator.generate(kind).SerializeToString()
        if number % 2:
            data = mutator.mangle(data)
        try:
            message = kind.FromString(data)
        except DecodeError:
            num_refused += 1
            with pytest.raises(InvalidRequest, match=r"^frame: cannot be read"):
                read.parse(data)
        else:
            assert read.parse(data) == message, data.hex()
    assert num_refused > 20


MALFORMED: dict[str, bytes] = {
    "a length beyond the end": of_length(2, b"x" * 40)[:-1],
    "a message beyond its own": of_length(2, b"\x0a\x05"),
    "no end of a number": b"\x08" + b"\xff" * 40,
    "a number without an end": b"\x08\x80",
    "half a number": b"\x0d\x01",
    "half a double": b"\x09\x01",
    "no such type": b"\x0e",
    "a group without end": b"\x7b\x08\x01",
    "an end without group": b"\x7c",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_rejected(name: str) -> None:
    """The whole message is rejected, so no items can be hidden behind the malformed field."""
    data = of_length(9, bytes(SMALL_BYTES)) + MALFORMED[name]
    with pytest.raises(InvalidRequest, match=r"^frame: cannot be read"):
        parser(target_pb2.VerifyRequest).parse(data)


def test_items_after_a_group_are_counted() -> None:
    """Field numbers inside an unknown group are not those of the message."""
    read: Any = parser(target_pb2.VerifyRequest)
    torn = of_length(2, b"\xff\xff\xff")  # not a valid VerifyRow
    data = b"\x7b" + torn * 60_000 + b"\x7c"
    assert read.parse(data).ByteSize() == len(data)
    after = data + of_length(2, b"") * MAX_FIELDS
    with pytest.raises(InvalidRequest, match=r"more than 131072 fields .* in rows$"):
        read.parse(after)
