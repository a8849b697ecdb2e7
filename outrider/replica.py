"""What a replica of a model tier reports to others: address, state, KV memory, cost of its passes.

Plain values, and their form as a record in the registry. Knows neither Redis nor protobuf.
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
    """As in model.proto."""

    STARTING = "starting"
    READY = "ready"
    # About to stop: no new generations.
    DRAINING = "draining"
    # A pass has not ended for too long: nothing is to be expected for now.
    STUCK = "stuck"
    # Passes fail, one after another: it tries passes of its own until one succeeds.
    FAILING = "failing"


@dataclass(frozen=True)
class Replica:
    """`address`: host:port as others reach it. What the model says is empty while it is loaded."""

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
        """Fields that it does not know are left out, those it misses are as if nothing was known.

        Raises ValueError for anything else.
        """
        try:
            said = json.loads(record)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(said, dict):
            raise ValueError("not an object")
        replica = cls(
            **{name: _text(said, name) for name in _TEXTS},
            **{name: _count(said, name) for name in _COUNTS},
            state=ReplicaState(said.get("state")),
        )
        split_address(replica.address)
        return replica


_TEXTS = ("tier", "id", "address", "model_fingerprint", "tokenizer_fingerprint")
_COUNTS = ("vocab_size", "kv_capacity_tokens", "kv_used_tokens", "num_open_generations")


def _text(said: dict[str, Any], name: str) -> Any:
    value = said.get(name, "" if name.endswith("_fingerprint") else None)
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        raise ValueError(f"{name} is no text of {_MAX_CHARS} characters at most")
    return value


def _count(said: dict[str, Any], name: str) -> Any:
    value = said.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:  # True is an int too
        raise ValueError(f"{name} is no count")
    return value


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises ValueError where it is not host:port."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 1 <= int(port[:6]) <= 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)


@dataclass(frozen=True)
class CostReport:
    """As model.proto's StepCosts: tokens of a pass, rising, and seconds it takes.

    `mean_num_rows`: of the target as a row finds it, a mean over rows; of the draft over passes.
    """

    num_tokens: tuple[int, ...] = (1,)
    step_s: tuple[float, ...] = (0.0,)
    row_s: float = 0.0
    mean_num_rows: float = 1.0

    def pass_s(self, num_tokens: float, num_rows: float) -> float:
        """Seconds of a pass over so many tokens of so many sequences."""
        curve_s = interpolated(num_tokens, self.num_tokens, self.step_s)
        return curve_s + max(0.0, num_rows - 1) * self.row_s


def interpolated(num_tokens: float, tokens: Sequence[float], seconds: Sequence[float]) -> float:
    """Piecewise linear; never below the first point; beyond the last the slope goes on."""
    if num_tokens <= tokens[0] or len(tokens) == 1:
        return seconds[0]
    right = min(bisect_left(tokens, num_tokens), len(tokens) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (tokens[right] - tokens[left])
    return seconds[left] + slope * (num_tokens - tokens[left])
