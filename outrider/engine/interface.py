"""Interface between a model service and its engine: appends, sample and score requests, results.

Plain data without torch. The service states which rows of logits belong to which request; the
engine samples for all generations together. `sampling/sampler.py` implements it with a model,
`simulated.py` without one.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from outrider.engine.kv.store import KVStore, Sequence
from outrider.engine.options import EngineInfo
from outrider.sampling.params import SamplingParams, Verification

Ids = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
# Result of a forward pass. Services pass it on without knowing its type.
Logits = Any

# Candidates reported with every sampled token: the tokens a draft may continue from.
NUM_CANDIDATES = 8


class Append(NamedTuple):
    """Tokens to append to one sequence; logits are returned for the last `num_logits` of them."""

    sequence: Sequence
    token_ids: Ids | list[int]
    num_logits: int


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Request to sample one token from one row of logits.

    `history()` returns the context, at least [:position]; called only if a logits processor needs
    it. `base_len`: position at which the token's block starts. `is_guess`: sample the token that
    the target would emit at `position`, to draft from, instead of a draft token. `forbidden`:
    bool [1, vocab or more], tokens that the output's format does not allow; None: none.
    """

    sampler: Sampler
    history: Callable[[], Ids]
    position: int
    base_len: int
    verification: Verification
    is_guess: bool
    forbidden: Ids | None = None


class SampledToken(NamedTuple):
    """One sampled token, its support and its candidates.

    `support`: ids and float32 weights of the distribution the token was sampled from; None for
    greedy and coupled verification.

    `candidate_ids` [<= NUM_CANDIDATES]: tokens the target may emit at the position, most likely
    first; the sampled token need not be among them. `candidate_scores`: their scores in falling
    order. Greedy: logits. Otherwise: log-probability plus the target's noise at the position. That
    noise decides what the target emits there: its own sample, or the recovered token if the sampled
    one is rejected.
    """

    token_id: int
    support: tuple[Ids, Floats] | None
    candidate_ids: Ids
    candidate_scores: Floats


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Request to score one block: 1 + γ rows of logits.

    `history`: the context with all draft tokens. `position`: position of the first row's token.
    `supports`: γ arrays of token ids, or None if no draft token has a support; γ + 1 arrays if the
    last row's token is a draft token too, which the model has not run. `forbidden`:
    bool [num_rows, vocab or more], tokens that the output's format does not allow; None: none.
    """

    sampler: Sampler
    history: Ids
    position: int
    num_rows: int
    supports: Seq[Ids] | None
    forbidden: Ids | None = None


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities from the model's raw logits, before any logits processor; float32.

    `support` [sum of sizes]; `samples` [γ + 1]; `top_ids` uint32 and `top` [γ + 1, n].
    """

    support: Floats
    samples: Floats
    top_ids: Ids
    top: Floats


@dataclass(frozen=True)
class BlockScores:
    """Target's scores of one block; shapes as in target.proto's VerifyResult."""

    sample_ids: Ids
    support_probs: Floats
    tail_mass: Floats
    tail_logprobs: Floats
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """Request for log-probabilities of prompt tokens [n], given n rows of logits before them.

    `num_top`: number of most likely tokens to report at each position.
    """

    next_token_ids: Ids
    num_top: int


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of prompt tokens [n], and of the most likely tokens [n, num_top]; float32.

    From the model's raw logits. `top_ids`: best first. `ranks` [n]: 1 plus the number of tokens
    that are more likely than the prompt's.
    """

    logprobs: Floats
    top_ids: Ids
    top: Floats
    ranks: Ids

    @classmethod
    def joined(cls, parts: Seq[PromptScores], num_top: int) -> PromptScores:
        """The scores of several parts of a prompt, in order; empty without parts."""
        nothing = np.zeros((0, num_top), np.float32)
        none = np.zeros(0, np.int64)
        empty = cls(none.astype(np.float32), nothing.astype(np.int64), nothing, none)
        every = (empty, *parts)
        return cls(
            np.concatenate([part.logprobs for part in every]),
            np.concatenate([part.top_ids for part in every]),
            np.concatenate([part.top for part in every]),
            np.concatenate([part.ranks for part in every]),
        )


class Sampler(Protocol):
    """Immutable sampling parameters of one generation, created by an engine."""

    @property
    def params(self) -> SamplingParams: ...


class ServedEngine(Protocol):
    """Engine as a model service uses it. Call every method on the device thread only.

    `sample` and `score` return one result per request, in order. A request that fails has its
    exception in its place; the others are not affected. All methods that compute raise
    StepOutOfMemory if memory runs out. Rows of `logits` are in the order of the
    requests; those of prompts (`score_prompts`) are the last ones.
    """

    @property
    def store(self) -> KVStore: ...

    @property
    def info(self) -> EngineInfo: ...

    def forward(self, appends: Seq[Append]) -> Logits: ...

    def sampler(
        self,
        params: SamplingParams,
        prompt_len: int,
        vocab_size: int,
        forbidden_ids: Ids | None = None,
    ) -> Sampler: ...

    def sample(
        self, requests: Seq[SampleRequest], logits: Logits
    ) -> list[SampledToken | Exception]: ...

    def score(
        self, requests: Seq[ScoreRequest], logits: Logits
    ) -> list[BlockScores | Exception]: ...

    def score_prompts(
        self, requests: Seq[PromptRequest], logits: Logits
    ) -> list[PromptScores | Exception]: ...
