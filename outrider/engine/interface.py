"""What the services ask of a forward pass's logits, many generations at a time, and what they get.

Plain data between a service and its engine: the service says which rows are whose, the engine draws
for all of them together. Knows no torch; `sampler` implements it for models, `simulation` without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from outrider.engine.kv.store import KVStore
from outrider.engine.options import EngineInfo
from outrider.sampling.params import SamplingParams, Verification

Ids = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
# What a forward pass returns; services pass it on without knowing its type.
Logits = Any

# Candidates told with every draw: whatever a drafter may want to draft on from.
NUM_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One token to draw from one row of logits.

    `history` gives the context, at least [:position]; called only where a processor needs it.
    `base_len` is where the token's block starts. `is_guess`: what the target would emit itself
    at `position`, to draft on from, rather than a draft token.
    """

    sampler: Sampler
    history: Callable[[], Ids]
    position: int
    base_len: int
    verification: Verification
    is_guess: bool


class SampledToken(NamedTuple):
    """`support`: ids and float32 weights the token was drawn from; None for greedy and coupled.

    `candidate_ids` [<= NUM_CANDIDATES]: what the target may emit at the position, likeliest first,
    the drawn token among them or not; `candidate_scores`: what they are ranked by, falling: logits
    (greedy), or log-probabilities with the target's noise of the position, which decides what the
    target emits there: its own draw, or the recovered token where the drawn one is rejected.
    """

    token_id: int
    support: tuple[Ids, Floats] | None
    candidate_ids: Ids
    candidate_scores: Floats


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """The target's answer to one block: 1 + γ rows of logits.

    `history` is the context with all draft tokens; `position` of the first row's token; `supports`
    γ arrays of ids, or None for none anywhere. γ + 1 arrays where the last row's token is a draft
    token, too, which the model has not run.
    """

    sampler: Sampler
    history: Ids
    position: int
    num_rows: int
    supports: Sequence[Ids] | None


@dataclass(frozen=True)
class Logprobs:
    """Of the model's own logits, before any processor; float32.

    `support` [sum of sizes]; `samples` [γ + 1]; `top_ids` uint32 and `top` [γ + 1, n].
    """

    support: Floats
    samples: Floats
    top_ids: Ids
    top: Floats


@dataclass(frozen=True)
class BlockScores:
    """What the target says of one block; shapes as in target.proto's VerifyResult."""

    sample_ids: Ids
    support_probs: Floats
    tail_mass: Floats
    tail_logprobs: Floats
    logprobs: Logprobs | None


class Sampler(Protocol):
    """One generation's fixed sampling state, made by an engine."""

    @property
    def params(self) -> SamplingParams: ...


class ServedEngine(Protocol):
    """What a service needs of an engine; every method on the device thread only.

    `draw` and `reply` give one result per ask, in order, an ask's own error in its place: one
    generation's failure is not the others'. Rows of `logits` are in the order of the asks.
    """

    @property
    def store(self) -> KVStore: ...

    @property
    def info(self) -> EngineInfo: ...

    def forward(self, appends: Sequence[Any]) -> Logits: ...

    def sampler(self, params: SamplingParams, prompt_len: int, vocab_size: int) -> Sampler: ...

    def sample(
        self, asks: Sequence[SampleRequest], logits: Logits
    ) -> list[SampledToken | Exception]: ...

    def score(
        self, asks: Sequence[ScoreRequest], logits: Logits
    ) -> list[BlockScores | Exception]: ...
