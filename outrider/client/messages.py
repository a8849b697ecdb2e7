"""Protobuf messages to and from plain Python values, by the names of the contract's fields.

An enum value is the lower-case name without its prefix: VERIFICATION_COUPLED is "coupled".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import struct
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from outrider.errors import InvalidRequest

Kind = TypeVar("Kind")


def read_message(kind: type[Kind], message: Message) -> Kind:
    """The dataclass `kind` with the message's fields; None for an absent optional field."""
    values: dict[str, Any] = {}
    for field, nested, is_optional in _fields(typing.cast(Any, kind), message.DESCRIPTOR):
        if is_optional and not message.HasField(field.name):
            values[field.name] = None
        else:
            values[field.name] = _read(getattr(message, field.name), field, nested)
    return kind(**values)


def enum_name(field: Any, number: int) -> str:
    """The value's name without the prefix that all values of its enum have, in lower case."""
    value = field.enum_type.values_by_number.get(number)
    if value is None:
        return f"unknown_{number}"  # of a later version
    return str(value.name.removeprefix(_prefix(field)).lower())


def fill_message(message: Message, name: str, value: Any, path: str) -> None:
    """Sets a field from a plain value; an object for a text field becomes JSON. Lists are appended.

    Raises InvalidRequest that names `path` for a value that the field cannot have.
    """
    field = message.DESCRIPTOR.fields_by_name[name]
    try:
        if field.message_type is None and not _is_many(getattr(message, name)):
            value = _number(field, value, path) if field.enum_type else _text(field, value)
            setattr(message, name, value)
        elif isinstance(getattr(message, name), Message):
            getattr(message, name).SetInParent()
            _fill_all(getattr(message, name), value, path)
        elif isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif field.message_type is None:
            values = [value] if isinstance(value, str) else value
            getattr(message, name).extend(_text(field, each) for each in values)
        else:
            for index, each in enumerate(value):
                _fill_all(getattr(message, name).add(), each, f"{path}[{index}]")
    except (TypeError, ValueError) as error:
        raise InvalidRequest(path, f"{reprlib.repr(value)}: {error}") from None


def _fill_all(message: Message, values: Mapping[str, Any], path: str) -> None:
    if not isinstance(values, Mapping):
        raise InvalidRequest(
            path, f"{reprlib.repr(values)} is not a mapping of field names to values"
        )
    for name, value in values.items():
        if name not in message.DESCRIPTOR.fields_by_name:
            known = ", ".join(message.DESCRIPTOR.fields_by_name)
            raise InvalidRequest(f"{path}.{name}", f"is not a field; fields are {known}")
        if value is not None:
            fill_message(message, name, value, f"{path}.{name}")


def _text(field: Any, value: Any) -> Any:
    """The value; for a text field, a mapping or list is JSON."""
    is_json = field.type == FieldDescriptor.TYPE_STRING and isinstance(value, Mapping | list)
    return json.dumps(value, ensure_ascii=False) if is_json else value


def _number(field: Any, value: Any, path: str) -> int:
    numbers = {enum_name(field, each.number): each.number for each in field.enum_type.values}
    name = str(value)
    if numbers.get(name, 0) == 0:
        allowed = ", ".join(name for name, number in numbers.items() if number)
        raise InvalidRequest(path, f"{name!r} is not one of {allowed}")
    return int(numbers[name])


def _prefix(field: Any) -> str:
    """The common start of the enum's value names: its first value is PREFIX_UNSPECIFIED."""
    return str(field.enum_type.values[0].name.removesuffix("UNSPECIFIED"))


def _is_many(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _read(value: Any, field: Any, nested: type[Any] | None) -> Any:
    if isinstance(value, Message):
        return read_message(nested, value) if nested is not None else _set_fields(value)
    if isinstance(value, Mapping):
        return dict(value)
    if _is_many(value):
        return [_read(each, field, nested) for each in value]
    if field.enum_type is not None:
        return enum_name(field, value)
    return _shortest(value) if field.type == FieldDescriptor.TYPE_FLOAT else value


def _set_fields(message: Message) -> dict[str, Any]:
    """The fields that are set, for a message without a dataclass."""
    return {field.name: _read(value, field, None) for field, value in message.ListFields()}


@functools.cache
def _fields(kind: Any, descriptor: Any) -> tuple[tuple[Any, Any, bool], ...]:
    """Of each field of the dataclass: the message's field, a nested dataclass, is it optional."""
    hints = typing.get_type_hints(kind)
    found = []
    for name in (field.name for field in dataclasses.fields(kind)):
        parts = _parts(hints[name])
        nested = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        found.append((descriptor.fields_by_name[name], nested, types.NoneType in parts))
    return tuple(found)


def _parts(hint: Any) -> list[Any]:
    arguments = typing.get_args(hint)
    return [hint, *(part for argument in arguments for part in _parts(argument))]


def _shortest(value: float) -> float:
    """The float32 as the shortest decimal that is equal to it: 0.1, not 0.10000000149."""
    for num_digits in (6, 7, 8):
        text = f"{value:.{num_digits}g}"
        if struct.pack("f", float(text)) == struct.pack("f", value):
            return float(text)
    return value
