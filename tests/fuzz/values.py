"""Values that programs trip over, by the kind of a protobuf field. Seeded; knows no service.

A few fields are drawn from small pools by their name, so that messages meet: what one has opened
another closes, opens again or takes over.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

GENERATION_IDS = tuple(range(1, 9))
SESSION_IDS = tuple(f"fuzz-{n}" for n in range(8))
# All of them are in every vocabulary and shorter than every context that is fuzzed.
SMALL = (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 100, 200)
UINT32 = (255, 256, 257, 4095, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
UINT64 = (*UINT32, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
INT32 = (-(2**31), -65536, -2, -1, 2**31 - 1)
FLOATS = (
    0.0, -0.0, 0.5, 0.9, 1.0, 1.5, 2.0, -1.0, -2.0, 2.5, 10.0, 10.5, 100.0, 101.0,
    1e-45, 1e-40, 1.2e-38, 1e-20, 1e-7, 1e20, 3.4e38, math.inf, -math.inf, math.nan,
)  # fmt: skip
STRINGS = (
    "", "a", "a b", "\0", "{}", "\n", "é\u0301", "\N{GRINNING FACE}" * 40, "x" * 128, "x" * 129,
    "../../etc/passwd", "%s%n", "\ufffd", "<s>", "x" * 5000,
)  # fmt: skip
_HUGE = 100_000
_INTEGERS = {
    FieldDescriptor.CPPTYPE_UINT32: UINT32,
    FieldDescriptor.CPPTYPE_UINT64: UINT64,
    FieldDescriptor.CPPTYPE_INT32: INT32,
    FieldDescriptor.CPPTYPE_INT64: INT32,
}


def tokens(values: Sequence[int]) -> bytes:
    """uint32 little-endian, as token ids travel."""
    return struct.pack(f"<{len(values)}I", *values)


class Values:
    """Draws from `chance`; the same seed, the same values."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def of(self, field: FieldDescriptor) -> Any:
        """One value that the field can hold; of a repeated field, one of its elements."""
        if field.cpp_type in _INTEGERS:
            return self._integer(field)
        if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
            return self.chance.choice(FLOATS)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self.chance.random() < 0.5
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return self.chance.choice((0, 1, 2, 3, 4, 77, -1, 2**31 - 1))
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.array()
        return self._string(field)

    def _integer(self, field: FieldDescriptor) -> int:
        level = self.chance.random()
        if field.name == "generation_id" and level < 0.85:
            return self.chance.choice(GENERATION_IDS)
        if field.name in ("epoch", "kept_epoch") and level < 0.7:
            return self.chance.choice((0, 1, 2, 3, 2**64 - 1))
        if field.name == "heartbeat_ms" and level < 0.9:
            return self.chance.choice((0, 60_000))
        edges = _INTEGERS[field.cpp_type]
        return self.chance.choice(SMALL if level < 0.6 else edges)

    def _string(self, field: FieldDescriptor) -> str:
        level = self.chance.random()
        if field.name in ("session_id", "forget_session_ids") and level < 0.8:
            return self.chance.choice(SESSION_IDS)
        return "x" * _HUGE if level > 0.99 else self.chance.choice(STRINGS)

    def array(self) -> bytes:
        """What stands where a packed array should: right, torn, out of range, huge or noise."""
        chance = self.chance
        level = chance.random()
        if level < 0.1:
            return b""
        if level < 0.5:
            return tokens([chance.randrange(250) for _ in range(chance.randrange(1, 24))])
        if level < 0.6:
            return tokens([chance.choice(UINT32) for _ in range(chance.randrange(1, 9))])
        if level < 0.75:
            sizes = [chance.choice((0, 1, 2, 3, 65535)) for _ in range(chance.randrange(1, 9))]
            return struct.pack(f"<{len(sizes)}H", *sizes)
        if level < 0.85:
            weights = [chance.choice(FLOATS) for _ in range(chance.randrange(1, 9))]
            return b"".join(struct.pack("<f", weight) for weight in weights)
        if level > 0.995:
            return tokens([chance.randrange(250)]) * _HUGE
        return chance.randbytes(chance.randrange(1, 64))
