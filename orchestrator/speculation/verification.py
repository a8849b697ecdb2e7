"""A round's draft tokens, the target's answer to them, and the judgement. Pure.

The plain values between the links (which know protobuf) and the session (which knows stops).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Proposal:
    """Draft tokens for a context of `base_len` tokens, the last of which it may only assume.

    `assumed_token_ids`: those right before base_len that were not committed when it was drafted.
    `supports`: the distribution each token was drawn from; None for greedy and coupled.
    """

    base_len: int
    token_ids: tuple[int, ...]
    supports: tuple[Support, ...] | None
    assumed_token_ids: tuple[int, ...] = ()

    def agrees(self, context: Sequence[int]) -> bool:
        """Whether it goes on from the context, or may come to; what it has left is not empty."""
        start = self.base_len - len(self.assumed_token_ids)
        num_known = len(context) - start
        path = (*self.assumed_token_ids, *self.token_ids)
        return num_known < len(path) and path[: max(0, num_known)] == tuple(context[start:])

    def continuing(self, context_len: int) -> Proposal | None:
        """What it proposes after a context that it agrees with; None: nothing yet.

        The rest of a proposal whose first tokens the target has emitted by itself is drawn from
        the same law as one drafted anew: it was drafted given just these tokens.
        """
        skipped = context_len - self.base_len
        if not 0 <= skipped < len(self.token_ids):
            return None
        supports = self.supports[skipped:] if self.supports is not None else None
        return Proposal(context_len, self.token_ids[skipped:], supports)

    def head(self, num_tokens: int) -> Proposal:
        """The same proposal with at most so many tokens."""
        if len(self.token_ids) <= num_tokens:
            return self
        supports = self.supports[:num_tokens] if self.supports is not None else None
        return Proposal(self.base_len, self.token_ids[:num_tokens], supports)

    def run_without(self, num_left_out: int) -> Proposal | None:
        """The draft tokens that a target judges which does not run the last `num_left_out`.

        With supports the first of those is judged, too. It must be: a draft token that is dropped
        because of what it is makes the output's distribution differ from the target's.
        """
        if not num_left_out:
            return self
        num_judged = len(self.token_ids) - num_left_out + (self.supports is not None)
        return self.head(num_judged) if num_judged else None


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one emitted token, and of the likeliest ones, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class VerifyResult:
    """The target's answer for γ draft tokens; shapes as in target.proto's VerifyResult.

    The support arrays are split by position. `logprobs` fields are None unless asked for.
    `num_left_out`: draft tokens that the model cannot run, as `Proposal.run_without` takes them.
    `step_s`: the target's own passes for it. `num_reused_tokens`: tokens of the row whose keys and
    values were in the replica's prefix cache.
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

    @property
    def num_run(self) -> int:
        """Draft tokens that the model has run, so that it holds their keys and values."""
        return len(self.sample_ids) - 1


def verify_proposal(
    proposal: Proposal | None,
    reply: VerifyResult,
    params: SamplingParams,
    verification: Verification,
    committed_len: int,
) -> VerifyOutcome:
    """What stands of the proposal, which continues a context of `committed_len` tokens."""
    if proposal is None:
        return VerifyOutcome(0, reply.sample_ids[0])
    if proposal.supports is None:
        return verify_equal(proposal.token_ids, reply.sample_ids)
    positions = range(committed_len, committed_len + len(proposal.token_ids))
    verify = verify_block if verification is Verification.BLOCK else verify_tokens
    return verify(
        proposal.token_ids,
        proposal.supports,
        VerifyInput(reply.support_probs, reply.tail_mass, reply.tail_logprobs, reply.sample_ids),
        uniforms(params.seed, Purpose.ACCEPT, positions, committed_len),
        lambda i, token_ids: target_gumbels(params.seed, committed_len + i, token_ids),
    )


def logprobs_of(
    token_id: int, position: int, proposal: Proposal | None, reply: VerifyResult
) -> TokenLogprobs | None:
    """The log-probabilities of the token emitted at a position of the block, where asked for."""
    if reply.sample_logprobs is None or reply.top_ids is None or reply.top_logprobs is None:
        return None
    logprob = float(reply.sample_logprobs[position])
    supports = proposal.supports if proposal is not None else None
    if supports is not None and reply.support_logprobs is not None and position < len(supports):
        index = supports[position].index_of(token_id)
        if index >= 0:  # else it is the target's draw from outside the support
            logprob = float(reply.support_logprobs[position][index])
    return TokenLogprobs(
        logprob,
        tuple(reply.top_ids[position].tolist()),
        tuple(reply.top_logprobs[position].tolist()),
    )
