"""State that a model replica reports: address, state, KV memory, cost of its passes.

Plain values and their JSON form. `outrider.redis.registry` stores them.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

# A fingerprint has 64 characters, an address some tens.
_MAX_CHARS = 1024


class ReplicaState(Enum):
    """Mirrors ReplicaState of model.proto."""

    STARTING = "starting"
    READY = "ready"
    # Will stop soon; accepts no new generations.
    DRAINING = "draining"
    # A pass has not ended for too long; no answers are expected now.
    STUCK = "stuck"
    # Consecutive passes failed; runs self-tests until one succeeds.
    FAILING = "failing"


@dataclass(frozen=True)
class Replica:
    """`address`: host:port for other hosts. Model fields are empty until the model is loaded."""

    tier: str
    id: str
    address: str
    state: ReplicaState
    model_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    vocab_size: int = 0
    kv_capacity_tokens: int = 0
    kv_used_tokens: int = 0
    num_open_generations: int = 0

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "state": self.state.value}).encode()

    @classmethod
    def from_json(cls, record: bytes) -> Replica:
        """Parses a record: unknown fields are ignored, missing ones get their defaults.

        Raises ValueError if the record is malformed.
        """
        fields = record_fields(record)
        replica = cls(
            **{name: text_field(fields, name, _default(name)) for name in _TEXTS},
            **{name: _count(fields, name) for name in _COUNTS},
            state=ReplicaState(fields.get("state")),
        )
        split_address(replica.address)
        return replica


_TEXTS = ("tier", "id", "address", "model_fingerprint", "tokenizer_fingerprint")
_COUNTS = ("vocab_size", "kv_capacity_tokens", "kv_used_tokens", "num_open_generations")


def record_fields(record: bytes) -> dict[str, Any]:
    """Fields of a JSON record in Redis. Raises ValueError if it is not an object."""
    try:
        fields = json.loads(record)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    return fields


def text_field(fields: dict[str, Any], name: str, default: str | None) -> Any:
    """A string of a record. Raises ValueError if it is none, or missing without a default."""
    value = fields.get(name, default)
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        raise ValueError(f"{name}: must be a string of at most {_MAX_CHARS} characters")
    return value


def _default(name: str) -> str | None:
    return "" if name.endswith("_fingerprint") else None


def _count(fields: dict[str, Any], name: str) -> Any:
    value = fields.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:  # True is an int, too
        raise ValueError(f"{name}: must be an integer in [0, 2^63)")
    return value


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises ValueError if it is not host:port."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port[:6]) <= 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)


@dataclass(frozen=True)
class CostReport:
    """Mirrors StepCosts of model.proto: tokens of a pass (rising) and its duration in seconds.

    `mean_num_rows`: sequences of a pass. The target's mean is over sequences, the draft's over
    passes.
    """

    num_tokens: tuple[int, ...] = (1,)
    step_s: tuple[float, ...] = (0.0,)
    row_s: float = 0.0
    mean_num_rows: float = 1.0

    def pass_s(self, num_tokens: float, num_rows: float) -> float:
        """Duration in seconds of a pass over `num_tokens` tokens of `num_rows` sequences."""
        curve_s = interpolated(num_tokens, self.num_tokens, self.step_s)
        return curve_s + max(0.0, num_rows - 1) * self.row_s


def interpolated(num_tokens: float, tokens: Sequence[float], seconds: Sequence[float]) -> float:
    """Piecewise linear; constant below the first point, extrapolated beyond the last."""
    if num_tokens <= tokens[0] or len(tokens) == 1:
        return seconds[0]
    right = min(bisect_left(tokens, num_tokens), len(tokens) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (tokens[right] - tokens[left])
    return seconds[left] + slope * (num_tokens - tokens[left])
