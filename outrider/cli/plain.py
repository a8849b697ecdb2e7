"""Protobuf messages as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message


def plain(message: Message) -> dict[str, Any]:
    """Every field by name, in the order of the contract; None for absent fields."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            values[field.name] = None
        else:
            values[field.name] = _plain(getattr(message, field.name), field)
    return values


def _plain(value: Any, field: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, float) and field.type == field.TYPE_FLOAT:
        return float(str(np.float32(value)))  # the shortest decimal of a float32
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, Mapping):  # of a map with plain values
        return dict(value)
    return [_plain(entry, field) for entry in value]
