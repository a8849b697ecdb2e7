"""What a message may become when it is parsed, looked at before it is.

Protobuf makes up to seventy bytes of memory of each byte that is sent: two say "one more empty
item". So a large message is walked through first, field by field, and refused where it has more of
them than any honest one. A small one cannot: it is parsed at once, and costs nothing here. Knows
protobuf's wire format and descriptors; no service, and no message's meaning.
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

# Of a message and all that are in it: 18 MiB of memory at most (135 bytes each, measured). A call
# with the longest chat, bias map and stop list that are allowed has 16,000.
MAX_FIELDS = 131_072
# Numbers of a repeated field, which take up to eight times as much once parsed. A million token ids
# of a large vocabulary are 3 MiB.
MAX_PACKED_BYTES = 8 << 20
# A field takes two bytes or more: what is no longer than this cannot have too many.
SMALL_BYTES = 2 * MAX_FIELDS
# A field takes about 0.5 us to walk over.
_FIELDS_PER_STEP = 2_048

_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)
_NO_NUMBERS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


@dataclass(frozen=True)
class MessageShape:
    """What may stand behind a length: `messages` by field number, and `packed` numbers."""

    messages: Mapping[int, MessageShape] = field(default_factory=dict)
    packed: frozenset[int] = frozenset()
    names: Mapping[int, str] = field(default_factory=dict)


def shape_of(kind: Descriptor) -> MessageShape:
    """Of a message that does not contain itself."""
    messages, packed = {}, set()
    for entry in kind.fields:
        if entry.message_type is not None:
            messages[entry.number] = shape_of(entry.message_type)
        elif entry.is_repeated and entry.type not in _NO_NUMBERS:
            packed.add(entry.number)
    names = {entry.number: entry.name for entry in kind.fields}
    return MessageShape(messages, frozenset(packed), names)


def check(data: bytes, shape: MessageShape) -> Iterator[None]:
    """Steps of the check, each of about a millisecond.

    Raises InvalidRequest for what would take too much memory, or is no message at all.
    """
    if len(data) <= SMALL_BYTES:
        return
    try:
        yield from _Walk(data, shape).run()
    except (IndexError, _Malformed):
        raise InvalidRequest("frame", "cannot be read: it is no message") from None


class _Malformed(Exception):
    """Whatever cannot be followed is refused: the parser might follow it."""


class _Walk:
    """Through one message, in the parser's order; never back."""

    def __init__(self, data: bytes, shape: MessageShape) -> None:
        self._data = data
        self._at = 0
        self._end = len(data)
        self._shape = shape
        # The messages that this one is in: where they end, what they are, and its name there.
        self._outer: list[tuple[int, MessageShape, str]] = []
        self._num_fields = 0
        self._num_packed = 0
        # Unknown groups that are open. Numbers in them are not those of the message.
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
        """What has a length: a message is gone into, the rest is passed over."""
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
                said = f"more than {MAX_PACKED_BYTES} bytes of numbers in one message"
                raise self._refusal(number, said)
        self._at += size

    def _name(self, number: int) -> str:
        return self._shape.names.get(number, str(number))

    def _refusal(self, number: int, said: str) -> InvalidRequest:
        path = [name for _, _, name in self._outer] + [self._name(number)]
        return InvalidRequest("frame", f"{said}, the last of them in {'.'.join(path)}")


class BoundedParser:
    """Parses one kind of message, after the check."""

    def __init__(self, kind: Descriptor) -> None:
        self._shape = shape_of(kind)
        self._class = message_factory.GetMessageClass(kind)

    def parse(self, data: bytes) -> Any:
        """Raises InvalidRequest that names `frame`."""
        for _ in check(data, self._shape):
            pass
        return self._parse(data)

    def begin(self, data: bytes) -> Any:
        """The message, the InvalidRequest, or a Large: gRPC reports whatever is raised as UNKNOWN.

        A deserializer of gRPC: it runs on the event loop and cannot wait.
        """
        if len(data) > SMALL_BYTES:
            return UnparsedRequest(data)
        try:
            return self._parse(data)
        except InvalidRequest as error:
            return error.with_traceback(None)  # the traceback holds the data

    async def finish(self, large: UnparsedRequest) -> Any:
        """The message or the InvalidRequest; other tasks run between the steps of the check."""
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
    """A request that `BoundedParser.finish` has to parse; `data` is empty from then on."""

    data: bytes


Handler = Any


def bounded(handler: Handler, method: str) -> Handler:
    """The handler of `/package.Service/Method` with requests parsed here.

    A frame of a stream is parsed on the event loop, and refused to its reader. A single request is
    refused before the method is called.
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
    assert not inspect.isasyncgenfunction(answer), "our servicers write to their context"

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
