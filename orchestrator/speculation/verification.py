"""Proposals, verify results, and which draft tokens are accepted. Pure.

Plain values: `orchestrator.replicas` converts them from and to protobuf, `orchestrator.generation`
commits them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, target_gumbels, uniforms
from outrider.sampling.support import Support
from outrider.sampling.verify import (
    VerifyInput,
    VerifyOutcome,
    verify_block,
    verify_equal,
    verify_tokens,
)

Floats = npt.NDArray[np.float32]


class SourceName(StrEnum):
    """Where draft tokens come from. AUTO stands in requests only: a source for each round.

    GRAMMAR stands in results only: tokens that the output's format forces.
    """

    AUTO = "auto"
    MODEL = "model"
    LOOKUP = "lookup"
    GRAMMAR = "grammar"
    NONE = "none"


# Rounds by (chosen source, reason), see `router`.
Choices = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Proposal:
    """Draft tokens that continue a context of `base_len` tokens.

    `assumed_token_ids`: the last tokens of that context that were not committed when the proposal
    was drafted. `supports`: the distribution of each draft token; None for greedy and coupled.
    """

    base_len: int
    token_ids: tuple[int, ...]
    supports: tuple[Support, ...] | None
    assumed_token_ids: tuple[int, ...] = ()
    source: SourceName = SourceName.MODEL

    def agrees(self, context: Sequence[int]) -> bool:
        """Whether it continues the context, or may continue it later, with at least one token."""
        start = self.base_len - len(self.assumed_token_ids)
        num_known = len(context) - start
        path = (*self.assumed_token_ids, *self.token_ids)
        return num_known < len(path) and path[: max(0, num_known)] == tuple(context[start:])

    def continuing(self, context_len: int) -> Proposal | None:
        """The draft tokens that follow a context it agrees with; None if there are none yet.

        The first draft tokens may be committed by now. The rest has the distribution of a new
        proposal, because it was drafted given these very tokens.
        """
        skipped = context_len - self.base_len
        if not 0 <= skipped < len(self.token_ids):
            return None
        supports = self.supports[skipped:] if self.supports is not None else None
        return Proposal(context_len, self.token_ids[skipped:], supports, source=self.source)

    def head(self, num_tokens: int) -> Proposal:
        """The proposal cut to at most `num_tokens` tokens."""
        if len(self.token_ids) <= num_tokens:
            return self
        supports = self.supports[:num_tokens] if self.supports is not None else None
        return Proposal(self.base_len, self.token_ids[:num_tokens], supports, source=self.source)

    def run_without(self, num_left_out: int) -> Proposal | None:
        """The draft tokens that are verified if the target does not run the last `num_left_out`.

        With supports the first of those is verified too. A draft token that is dropped because of
        its value would make the output's distribution differ from the target's.
        """
        if not num_left_out:
            return self
        num_verified = len(self.token_ids) - num_left_out + (self.supports is not None)
        return self.head(num_verified) if num_verified else None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of an emitted token, and of the most likely tokens, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """Log-probabilities of the tokens of a prompt [n], each given those before it.

    `logprobs` [n - 1]: of token i + 1. `top_ids`, `top_logprobs` [n - 1, num_top]: of the most
    likely tokens at each of these positions, best first. `ranks` [n - 1]: 1 plus the number of
    tokens that are more likely than token i + 1; [0] if the target does not report them.
    """

    logprobs: Floats
    top_ids: npt.NDArray[np.int64]
    top_logprobs: Floats
    ranks: npt.NDArray[np.int64]
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class VerifyResult:
    """The target's result for γ draft tokens; shapes as in target.proto's VerifyResult.

    The support arrays are split by position. Log-probabilities are None unless requested.
    `num_left_out`: draft tokens that the model cannot run, as in `Proposal.run_without`. `step_s`:
    seconds of the target's passes for this request. `num_reused_tokens`: tokens of the request
    whose keys and values were in the replica's prefix cache.
    """

    sample_ids: Sequence[int]
    support_probs: Sequence[npt.NDArray[np.float64]]
    tail_mass: npt.NDArray[np.float64]
    tail_logprobs: npt.NDArray[np.float64]
    step_s: float = 0.0
    num_reused_tokens: int = 0
    num_left_out: int = 0
    support_logprobs: Sequence[Floats] | None = None
    sample_logprobs: Floats | None = None
    top_ids: npt.NDArray[np.int64] | None = None
    top_logprobs: Floats | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Without `token_ids`."""

    @property
    def num_run(self) -> int:
        """Draft tokens that the model has run. The target has their keys and values."""
        return len(self.sample_ids) - 1


def verify_proposal(
    proposal: Proposal | None,
    result: VerifyResult,
    params: SamplingParams,
    verification: Verification,
    committed_len: int,
    planted_bias: float = 0.0,
) -> VerifyOutcome:
    """Accepts or rejects draft tokens that continue a context of `committed_len` tokens.

    `planted_bias`: a defect to try the audit with. It makes sampled outputs wrong: the uniforms of
    acceptance are scaled by 1 - bias, so acceptance probabilities by 1 / (1 - bias), at most to 1.
    """
    if proposal is None:
        return VerifyOutcome(0, result.sample_ids[0])
    if proposal.supports is None:
        return verify_equal(proposal.token_ids, result.sample_ids)
    target = VerifyInput(
        result.support_probs, result.tail_mass, result.tail_logprobs, result.sample_ids
    )
    positions = range(committed_len, committed_len + len(proposal.token_ids))
    verify = verify_block if verification is Verification.BLOCK else verify_tokens
    return verify(
        proposal.token_ids,
        proposal.supports,
        target,
        (1 - planted_bias) * uniforms(params.seed, Purpose.ACCEPT, positions, committed_len),
        lambda i, token_ids: target_gumbels(params.seed, committed_len + i, token_ids),
    )


def logprobs_of(
    token_id: int,
    position: int,
    proposal: Proposal | None,
    result: VerifyResult,
    num_top: int | None,
) -> TokenLogprobs | None:
    """Log-probabilities of the token emitted at a position of the block, and of the `num_top` best.

    None if `num_top` is None. The result may have more: for an observer of the generation.
    """
    if num_top is None or result.sample_logprobs is None:
        return None
    assert result.top_ids is not None, "they come together"
    assert result.top_logprobs is not None, "they come together"
    logprob = float(result.sample_logprobs[position])
    supports = proposal.supports if proposal is not None else None
    if supports is not None and result.support_logprobs is not None and position < len(supports):
        index = supports[position].index_of(token_id)
        if index >= 0:  # otherwise the target sampled it outside the support
            logprob = float(result.support_logprobs[position][index])
    return TokenLogprobs(
        logprob,
        tuple(result.top_ids[position, :num_top].tolist()),
        tuple(result.top_logprobs[position, :num_top].tolist()),
    )
