"""A real engine that records its input, with a clock that advances by given costs of passes.

So decisions by cost can be tested without real time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from outrider.engine import (
    Append,
    Engine,
    EngineInfo,
    KVStore,
    SampledToken,
    Sampler,
    SampleRequest,
    ScoreRequest,
)
from outrider.sampling.params import SamplingParams


class Clock:
    """Replaces the `time` of a module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class Fed(NamedTuple):
    """Tokens appended to a sequence, the first of them at `start`."""

    sequence: Any
    start: int
    token_ids: list[int]


@dataclass(eq=False)
class NotingEngine:
    """A pass takes base_s + tokens * token_s + (rows - 1) * row_s. `passes`: input of each."""

    engine: Engine
    clock: Clock
    base_s: float = 0.0
    token_s: float = 0.0
    row_s: float = 0.0

    def __post_init__(self) -> None:
        self.passes: list[list[Fed]] = []

    @property
    def store(self) -> KVStore:
        return self.engine.store

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def forward(self, appends: Sequence[Append]) -> Any:
        fed = [Fed(a.sequence, a.sequence.length, list(map(int, a.token_ids))) for a in appends]
        self.passes.append(fed)
        num_tokens = sum(len(part.token_ids) for part in fed)
        self.clock.now += self.base_s + num_tokens * self.token_s + (len(fed) - 1) * self.row_s
        return self.engine.forward(appends)

    def sampler(
        self, params: SamplingParams, prompt_len: int, vocab_size: int, forbidden_ids: Any = None
    ) -> Sampler:
        return self.engine.sampler(params, prompt_len, vocab_size, forbidden_ids)

    def sample(self, asks: Sequence[SampleRequest], logits: Any) -> list[SampledToken | Exception]:
        return self.engine.sample(asks, logits)

    def score(self, asks: Sequence[ScoreRequest], logits: Any) -> list[Any]:
        return self.engine.score(asks, logits)
