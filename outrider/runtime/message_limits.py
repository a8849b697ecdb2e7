"""Message limits: bounds the memory and time of parsing, by a check before the parser.

An empty list item has two bytes on the wire and a hundred in memory. So large messages are walked
field by field first, and rejected if they have more fields than any valid request. Small ones are
parsed at once.

A plain size limit is not enough. Valid requests and frames have several MiB: texts, and contexts of
four bytes per token. The parser makes 208 MiB of 4 MiB of empty opens, in 92 ms. Of 20 MiB it makes
1.1 GiB, in 0.5 s. It holds the GIL, so a thread does not help. (upb of protobuf 7.36, one core of
an AMD EPYC: CPU time and resident memory of `VerifyRequest.FromString` for `tests.fuzz.bombs`.)
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from outrider.errors import InvalidRequest
from outrider.runtime.grpc_status import translated

Parsed = TypeVar("Parsed", bound=Message)

# Fields of a message, nested ones included: at most 18 MiB of memory (135 bytes each, measured). A
# request with the longest chat, bias map and stop list allowed has 16,000.
MAX_FIELDS = 131_072
# Bytes of packed numbers, which take up to eight times as much once parsed. A million token ids of
# a large vocabulary are 3 MiB.
MAX_PACKED_BYTES = 8 << 20
# A field has at least two bytes, so a message of this size cannot have too many.
SMALL_BYTES = 2 * MAX_FIELDS
# Fields checked between two yields to the event loop: about a millisecond at 0.5 us each.
_FIELDS_PER_STEP = 2_048

_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)
_NO_NUMBERS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


@dataclass(frozen=True)
class MessageShape:
    """Fields of a message type by number: nested `messages`, `packed` numbers, all `names`."""

    messages: Mapping[int, MessageShape] = field(default_factory=dict)
    packed: frozenset[int] = frozenset()
    names: Mapping[int, str] = field(default_factory=dict)


def shape_of(kind: Descriptor) -> MessageShape:
    """The shape of a message type, which must not be recursive."""
    messages, packed = {}, set()
    for entry in kind.fields:
        if entry.message_type is not None:
            messages[entry.number] = shape_of(entry.message_type)
        elif entry.is_repeated and entry.type not in _NO_NUMBERS:
            packed.add(entry.number)
    names = {entry.number: entry.name for entry in kind.fields}
    return MessageShape(messages, frozenset(packed), names)


def check(data: bytes, shape: MessageShape) -> Iterator[None]:
    """Checks a message in steps of about a millisecond each.

    Raises InvalidRequest if it would take too much memory or is malformed.
    """
    if len(data) <= SMALL_BYTES:
        return
    try:
        yield from _Scan(data, shape).run()
    except (IndexError, _Malformed):
        raise InvalidRequest("frame", "cannot be read: malformed message") from None


class _Malformed(Exception):
    """The message cannot be followed. It is rejected, because the parser might accept it."""


class _Scan:
    """One pass over a message, in the parser's order."""

    def __init__(self, data: bytes, shape: MessageShape) -> None:
        self._data = data
        self._at = 0
        self._end = len(data)
        self._shape = shape
        # Stack of the enclosing messages: their end, their shape, the name of the field inside.
        self._outer: list[tuple[int, MessageShape, str]] = []
        self._num_fields = 0
        self._num_packed = 0
        # Open unknown groups. Field numbers inside a group are not those of the message.
        self._num_groups = 0

    def run(self) -> Iterator[None]:
        while self._has_more():
            if self._num_fields % _FIELDS_PER_STEP == _FIELDS_PER_STEP - 1:
                yield
            tag = self._varint()
            number, kind = tag >> 3, tag & 7
            self._num_fields += 1
            if self._num_fields > MAX_FIELDS:
                raise self._refusal(number, f"more than {MAX_FIELDS} fields in one message")
            if kind == _LENGTH:
                self._value(number, self._varint())
            elif kind == _VARINT:
                self._varint()
            elif kind in (_FIXED32, _FIXED64):
                self._at += 4 if kind == _FIXED32 else 8
            elif kind in (_GROUP, _END_GROUP):
                self._num_groups += 1 if kind == _GROUP else -1
            else:
                raise _Malformed
            if self._at > self._end or self._num_groups < 0:
                raise _Malformed

    def _has_more(self) -> bool:
        while self._at == self._end:
            if self._num_groups:
                raise _Malformed
            if not self._outer:
                return False
            self._end, self._shape, _ = self._outer.pop()
        return True

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise _Malformed

    def _value(self, number: int, size: int) -> None:
        """A field with a length: enters a nested message, skips anything else."""
        inner = None if self._num_groups else self._shape.messages.get(number)
        if inner is not None:
            if self._at + size > self._end:
                raise _Malformed
            self._outer.append((self._end, self._shape, self._name(number)))
            self._end, self._shape = self._at + size, inner
            return
        if number in self._shape.packed:
            self._num_packed += size
            if self._num_packed > MAX_PACKED_BYTES:
                why = f"more than {MAX_PACKED_BYTES} bytes of numbers in one message"
                raise self._refusal(number, why)
        self._at += size

    def _name(self, number: int) -> str:
        return self._shape.names.get(number, str(number))

    def _refusal(self, number: int, why: str) -> InvalidRequest:
        path = [name for _, _, name in self._outer] + [self._name(number)]
        return InvalidRequest("frame", f"{why}, the last of them in {'.'.join(path)}")


class BoundedParser:
    """Parser of one message type that checks each message first."""

    def __init__(self, kind: Descriptor) -> None:
        self._shape = shape_of(kind)
        self._class = message_factory.GetMessageClass(kind)

    def parse(self, data: bytes) -> Any:
        """Checks and parses a message at once. Raises InvalidRequest for the field `frame`."""
        for _ in check(data, self._shape):
            pass
        return self._parse(data)

    def begin(self, data: bytes) -> Any:
        """gRPC deserializer: returns the message, an InvalidRequest or an UnparsedRequest.

        It runs on the event loop and cannot wait. gRPC reports any exception raised here as
        UNKNOWN, so the error is returned.
        """
        if len(data) > SMALL_BYTES:
            return UnparsedRequest(data)
        try:
            return self._parse(data)
        except InvalidRequest as error:
            return error.with_traceback(None)  # the traceback references the data

    async def finish(self, large: UnparsedRequest) -> Any:
        """The message or an InvalidRequest; other tasks run between the steps of the check."""
        data, large.data = large.data, b""
        try:
            for _ in check(data, self._shape):
                await asyncio.sleep(0)
            return self._parse(data)
        except InvalidRequest as error:
            return error.with_traceback(None)

    def _parse(self, data: bytes) -> Any:
        try:
            return self._class.FromString(data)
        except DecodeError as error:
            raise InvalidRequest("frame", f"cannot be read: {error}") from None


@dataclass
class UnparsedRequest:
    """A request that `BoundedParser.finish` has to parse, which then clears `data`."""

    data: bytes


Handler = Any


def bounded(handler: Handler, method: str) -> Handler:
    """The handler of `/package.Service/Method` with its requests parsed by a BoundedParser.

    A stream's frame is parsed on the event loop, and its reader gets the error. A single request is
    rejected before the method is called.
    """
    described = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
    parser = BoundedParser(described.input_type)
    serializer = handler.response_serializer
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(
            handler.stream_stream, parser.parse, serializer
        )
    if handler.unary_stream is not None:
        answer = _refusing(handler.unary_stream, parser)
        return grpc.unary_stream_rpc_method_handler(answer, parser.begin, serializer)
    answer = _refusing(handler.unary_unary, parser)
    return grpc.unary_unary_rpc_method_handler(answer, parser.begin, serializer)


def _refusing(
    answer: Callable[[Any, Any], Any], parser: BoundedParser
) -> Callable[[Any, Any], Any]:
    assert not inspect.isasyncgenfunction(answer), "Outrider's servicers write to their context"

    async def bounded_answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, UnparsedRequest):
            request = await parser.finish(request)
        if isinstance(request, InvalidRequest):
            async with translated(context):
                try:
                    raise request
                finally:
                    del request
            return None
        return await answer(request, context)

    return bounded_answer
