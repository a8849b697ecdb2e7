"""Random JSON schemas, in the shapes of public JSON Schema test suites. Pure.

Each shape is a keyword group of such a suite: scalars with bounds, enums and constants, formats,
patterns, arrays and tuples, objects with required, optional, additional and pattern properties,
unions, references and recursion. Most are bounded, so that even a model that knows no JSON ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = (
    "id",
    "name",
    "kind",
    "size",
    "when",
    "tags",
    "unit",
    "note",
    "left",
    "right",
    "größe",
    "a b",
)
_FORMATS = ("date", "time", "uuid", "ipv4", "email", "hostname")
_PATTERNS = ("^[a-z]{1,4}$", "^(ab|cd)+e$", "^[0-9]{3}-[0-9]{2}$", "^x[^y]?y$", "^\\d{1,3}%$")
_MAX_DEPTH = 3


def random_schema(rng: random.Random) -> Schema:
    """A schema whose output is an object; no whitespace between its tokens."""
    schema = _object(rng, 0)
    if rng.random() < 0.15:
        schema = _recursive(rng)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | _COMPACT


# llguidance's option: otherwise a random model writes mostly whitespace.
_COMPACT: Schema = {"x-guidance": {"whitespace_flexible": False}}


def _any(rng: random.Random, depth: int) -> Schema:
    scalars: list[Callable[[random.Random], Schema]] = [
        _string, _string, _pattern, _format, _integer, _number, _enum, _const, _flag, _nullable,
    ]  # fmt: skip
    nested: list[Callable[[random.Random, int], Schema]] = [_array, _tuple, _object, _map, _union]
    if depth < _MAX_DEPTH and rng.random() < 0.45:
        return rng.choice(nested)(rng, depth + 1)
    return rng.choice(scalars)(rng)


def _string(rng: random.Random) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _pattern(rng: random.Random) -> Schema:
    pattern = rng.choice(_PATTERNS)
    return {"type": "string", "pattern": pattern} | ({"maxLength": 9} if "+" in pattern else {})


def _format(rng: random.Random) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _integer(rng: random.Random) -> Schema:
    least = rng.choice((-1000, -7, 0, 1, 12))
    bounds: Schema = {"minimum": least, "maximum": least + rng.choice((0, 1, 9, 250, 40_000))}
    if rng.random() < 0.3:
        bounds = {"exclusiveMinimum": least - 1, "exclusiveMaximum": least + 20}
    if rng.random() < 0.2:
        bounds = {"minimum": 0, "maximum": 600, "multipleOf": rng.choice((2, 5, 10))}
    return {"type": "integer"} | bounds


def _number(rng: random.Random) -> Schema:
    least = rng.choice((-2.5, 0, 0.25))
    return {"type": "number", "minimum": least, "maximum": least + rng.choice((0.5, 3, 100))}


def _enum(rng: random.Random) -> Schema:
    values = ["red", "green", "größer", "", "\"'\\", 1, -2.5, True, None, [1, 2], {"a": 1}]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice(["fixed", 7, None, False, ["x"], {"k": "v"}])}


def _flag(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def _nullable(rng: random.Random) -> Schema:
    return {"type": rng.choice((["boolean", "null"], ["string", "null"])), "maxLength": 4}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + rng.randint(0, 2)}
    return {"type": "array", "items": _any(rng, depth)} | bounds


def _tuple(rng: random.Random, depth: int) -> Schema:
    items = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    properties = {name: _any(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _map(rng: random.Random, depth: int) -> Schema:
    """Names by pattern, one of them required, so that it is not only {}."""
    return {
        "type": "object",
        "properties": {"x0": _any(rng, depth)},
        "patternProperties": {"^k[0-9]$": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["x0"],
        "additionalProperties": False,
        "maxProperties": 3,
    }


def _union(rng: random.Random, depth: int) -> Schema:
    kinds = [_any(rng, depth) for _ in range(rng.randint(2, 3))]
    if rng.random() < 0.5:
        return {"anyOf": kinds}
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": f"k{i}"}, "value": kind},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for i, kind in enumerate(kinds)
        ]
    }


def _recursive(rng: random.Random) -> Schema:
    """A tree by reference; `next` may be null, so it may end anywhere."""
    return {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "value": _any(rng, _MAX_DEPTH)},
        "required": ["root"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "label": {"enum": ["x", "y"]},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["label", "next"],
                "additionalProperties": False,
            }
        },
    }
