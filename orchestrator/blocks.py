"""A round's draft tokens, the target's answer to them, and the judgement. Pure.

The plain values between the links (which know protobuf) and the session (which knows stops).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, uniforms
from outrider.sampling.support import Support
from outrider.sampling.verify import Evidence, Verdict, verify_block, verify_equal, verify_tokens

Floats = npt.NDArray[np.float32]


class Outcome(NamedTuple):
    """How a round ended: of proposal `parent` (0: none) so many tokens stand, this one follows."""

    parent: int
    num_accepted: int
    next_token: int


@dataclass(frozen=True)
class Proposal:
    """Draft tokens for the context of length `base_len` that `outcome` led to.

    `supports`: the distribution each token was drawn from; None for greedy and coupled.
    """

    id: int
    outcome: Outcome
    base_len: int
    token_ids: tuple[int, ...]
    supports: tuple[Support, ...] | None

    def head(self, num_tokens: int) -> Proposal:
        """The same proposal with at most so many tokens."""
        if len(self.token_ids) <= num_tokens:
            return self
        supports = self.supports[:num_tokens] if self.supports is not None else None
        return Proposal(self.id, self.outcome, self.base_len, self.token_ids[:num_tokens], supports)


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one emitted token, and of the likeliest ones, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class TargetReply:
    """The target's answer for γ draft tokens; shapes as in target.proto's VerifyResult.

    The support arrays are split by position. `logprobs` fields are None unless asked for.
    """

    sample_ids: Sequence[int]
    support_probs: Sequence[npt.NDArray[np.float64]]
    tail_mass: npt.NDArray[np.float64]
    support_logprobs: Sequence[Floats] | None = None
    sample_logprobs: Floats | None = None
    top_ids: npt.NDArray[np.int64] | None = None
    top_logprobs: Floats | None = None


def judge(
    proposal: Proposal | None,
    reply: TargetReply,
    params: SamplingParams,
    verification: Verification,
    committed_len: int,
) -> Verdict:
    """What stands of the proposal, which continues a context of `committed_len` tokens."""
    if proposal is None:
        return Verdict(0, reply.sample_ids[0])
    if proposal.supports is None:
        return verify_equal(proposal.token_ids, reply.sample_ids)
    positions = range(committed_len, committed_len + len(proposal.token_ids))
    verify = verify_block if verification is Verification.BLOCK else verify_tokens
    return verify(
        proposal.token_ids,
        proposal.supports,
        Evidence(reply.support_probs, reply.tail_mass, reply.sample_ids),
        uniforms(params.seed, Purpose.ACCEPT, positions, committed_len),
        uniforms(params.seed, Purpose.RECOVER, positions, committed_len),
    )


def logprobs_of(
    token_id: int, position: int, proposal: Proposal | None, reply: TargetReply
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
