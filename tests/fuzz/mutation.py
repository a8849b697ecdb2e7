"""Bad messages from good ones, and out of nothing: by a message's fields, and by its bytes.

Knows what protobuf allows, and no service. Seeded: the same seed, the same messages.
"""

from __future__ import annotations

import random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.fuzz.values import Values

AnyMessage = TypeVar("AnyMessage", bound=Message)
_MESSAGE = FieldDescriptor.CPPTYPE_MESSAGE


class Mutator:
    """`generate` and `mutate` give messages, `mangle` bytes that may be none."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.values = Values(chance)

    def generate(self, kind: type[AnyMessage]) -> AnyMessage:
        """Every field set or not, to anything that its type allows."""
        message = kind()
        for field in kind.DESCRIPTOR.fields:
            if self.chance.random() < 0.6:
                self._fill(message, field)
        return message

    def mutate(self, message: AnyMessage) -> AnyMessage:
        """A copy with one to three changes, anywhere in it."""
        changed = type(message)()
        changed.CopyFrom(message)
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            node = self._node(changed)
            if node.DESCRIPTOR.fields:
                self._change(node, self.chance.choice(node.DESCRIPTOR.fields))
        return changed

    def mangle(self, data: bytes) -> bytes:
        """Cut short, flipped, with bytes taken out, put in or said twice."""
        chance, size = self.chance, len(data)
        start = chance.randrange(size + 1)
        stop = min(size, start + chance.choice((1, 1, 2, 4, 16, 200)))
        match chance.randrange(6):
            case 0:
                return data[:start]
            case 1:
                return data[:start] + data[stop:]
            case 2:
                return data[:stop] + data[start:]
            case 3:
                return data[:start] + chance.randbytes(stop - start) + data[stop:]
            case 4:
                return data[:start] + chance.randbytes(chance.randrange(1, 12)) + data[start:]
            case _:
                flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in data[start:stop])
                return data[:start] + flipped + data[stop:]

    def garbage(self) -> bytes:
        """Bytes that nobody has meant for anything."""
        return self.chance.randbytes(self.chance.choice((1, 3, 10, 100, 5000)))

    def _node(self, message: Message) -> Message:
        """The message itself or, as likely as not, one of those in it."""
        below = [
            part
            for field, value in message.ListFields()
            if field.cpp_type == _MESSAGE and not _is_map(field)
            for part in (value if field.is_repeated else (value,))
        ]
        if below and self.chance.random() < 0.8:
            return self._node(self.chance.choice(below))
        return message

    def _change(self, message: Message, field: FieldDescriptor) -> None:
        value = getattr(message, field.name)
        level = self.chance.random()
        if level < 0.15:
            message.ClearField(field.name)
        elif field.is_repeated and not _is_map(field) and len(value) and level < 0.55:
            self._change_element(value, field)
        elif field.type == FieldDescriptor.TYPE_BYTES and not field.is_repeated and level < 0.5:
            setattr(message, field.name, self.mangle(value))
        else:
            self._fill(message, field)

    def _change_element(self, elements: Any, field: FieldDescriptor) -> None:
        index = self.chance.randrange(len(elements))
        if self.chance.random() < 0.3:
            del elements[index]
        elif self.chance.random() < 0.8:  # the same once more, or many times
            element = elements[index]
            elements.extend([element] * self.chance.choice((1, 1, 2, 300)))
        elif field.cpp_type != _MESSAGE:
            elements[index] = self.values.of(field)

    def _fill(self, message: Message, field: FieldDescriptor) -> None:
        value = getattr(message, field.name)
        if _is_map(field):
            entry = field.message_type.fields_by_name
            for _ in range(self._count()):
                value[self.values.of(entry["key"])] = self.values.of(entry["value"])
        elif field.is_repeated:
            for _ in range(self._count()):
                if field.cpp_type == _MESSAGE:
                    value.append(self.generate(field.message_type._concrete_class))
                else:
                    value.append(self.values.of(field))
        elif field.cpp_type == _MESSAGE:
            value.CopyFrom(self.generate(field.message_type._concrete_class))
        else:
            setattr(message, field.name, self.values.of(field))

    def _count(self) -> int:
        return self.chance.choice((0, 1, 1, 1, 2, 3, 5))


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)
