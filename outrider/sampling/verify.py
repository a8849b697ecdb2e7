"""Verification of one block of draft tokens; exact, with target probabilities on supports only.

For each draft position i the target gives its probabilities p on the draft's support, the mass
outside it (`tail_mass`), and one sample from its distribution outside it (`samples`). Speculative
sampling needs no more: outside the support the draft's probability q is zero, so the residual
max(p - q, 0) equals p there. Nothing is approximated.

After a rejection, the recovered token is the Gumbel-max over the residual, with the noise that the
target used for the sample. The sample is the argmax of log p + noise outside the support, so the
maximum over the support and the sample is the maximum over all tokens. A draft that knows the noise
can predict the recovered token. Sharing the noise is exact: each position's noise is used exactly
once, where the block ends. Acceptance uses its own uniforms, and the mass outside the support, not
the sample.

Pure: uniforms and noise are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.sampling.support import Support

Floats = npt.NDArray[np.float64]
# (draft position of the block, token ids int64 [n]) -> standard Gumbel noise, float64 [n].
Noise = Callable[[int, npt.NDArray[np.int64]], Floats]


@dataclass(frozen=True)
class VerifyInput:
    """The target's result for a block of γ draft tokens.

    `target_probs[i]` float64 [len(supports[i])]; `tail_mass` float64 [γ]. `samples`: γ + 1 token
    ids, at i < γ from outside the support, at γ from all tokens. Only γ of them if the target could
    not run the last draft token: then there is no bonus token. `tail_logprobs` float64 [γ]: log p
    of the samples at i < γ, -inf if nothing is outside the support. Their rounding to float32
    changes a distribution by at most 2**-24 times its entropy in nats, about as much as the
    rounding of the probabilities.
    """

    target_probs: Sequence[Floats]
    tail_mass: Floats
    tail_logprobs: Floats
    samples: Sequence[int]


@dataclass(frozen=True)
class VerifyOutcome:
    """The first `num_accepted` draft tokens, then `next_token`; None: no token follows."""

    num_accepted: int
    next_token: int | None


def verify_equal(draft_token_ids: Sequence[int], samples: Sequence[int]) -> VerifyOutcome:
    """Accepts draft tokens while they equal the target's: greedy and Gumbel-coupled sampling.

    The emitted tokens are a prefix of `samples`, whatever the draft (Daliri, Musco, Suresh 2024,
    arXiv 2408.07978).
    """
    num_accepted = 0
    for token_id, sample in zip(draft_token_ids, samples, strict=False):
        if token_id != sample:
            break
        num_accepted += 1
    return VerifyOutcome(num_accepted, samples[num_accepted])


def _recover(support: Support, evidence: VerifyInput, i: int, reach: float, noise: Noise) -> int:
    """A sample from max(reach * target - draft, 0), normalised, at draft position i.

    Gumbel-max: the argmax of log weight + noise is distributed by the weights.
    """
    target_probs, tail = evidence.target_probs[i], float(evidence.tail_logprobs[i])
    residual = np.maximum(reach * target_probs - support.probs, 0.0)
    if tail == -math.inf and not residual.any():
        # Draft and target differ by rounding only, which caused the rejection. Any distribution
        # between the two is right, and there is no sample outside the support.
        residual = target_probs
    token_ids = np.append(support.token_ids, evidence.samples[i])
    with np.errstate(divide="ignore"):
        log_weights = np.append(np.log(residual), math.log(reach) + tail)
    return int(token_ids[np.argmax(log_weights + noise(i, token_ids))])


def _all_accepted(gamma: int, evidence: VerifyInput) -> VerifyOutcome:
    return VerifyOutcome(gamma, evidence.samples[gamma] if len(evidence.samples) > gamma else None)


def verify_tokens(
    draft_token_ids: Sequence[int],
    supports: Sequence[Support],
    evidence: VerifyInput,
    accept_uniforms: Sequence[float] | Floats,
    noise: Noise,
) -> VerifyOutcome:
    """Speculative sampling, token by token (Leviathan et al. 2023, Theorem 1; Chen et al. 2023).

    `accept_uniforms` in [0, 1): one per draft position. `noise`: that of the samples.
    """
    for i, (token_id, support) in enumerate(zip(draft_token_ids, supports, strict=True)):
        target_probs = evidence.target_probs[i]
        index = support.index_of(token_id)
        if accept_uniforms[i] * support.probs[index] < target_probs[index]:
            continue
        return VerifyOutcome(i, _recover(support, evidence, i, 1.0, noise))
    return _all_accepted(len(draft_token_ids), evidence)


def verify_block(
    draft_token_ids: Sequence[int],
    supports: Sequence[Support],
    evidence: VerifyInput,
    accept_uniforms: Sequence[float] | Floats,
    noise: Noise,
) -> VerifyOutcome:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, Algorithm 2).

    Accepts at least as many tokens in the mean as `verify_tokens`.

    `reach` is the paper's p̂_i, the probability that the first i tokens can be accepted.
    """
    gamma = len(draft_token_ids)
    reach = 1.0
    num_accepted, reach_accepted = 0, 1.0
    for i, (token_id, support) in enumerate(zip(draft_token_ids, supports, strict=True)):
        index = support.index_of(token_id)
        reach = min(1.0, reach * float(evidence.target_probs[i][index] / support.probs[index]))
        accept_prob = reach
        if i + 1 < gamma:
            excess = np.maximum(reach * evidence.target_probs[i + 1] - supports[i + 1].probs, 0.0)
            mass = float(excess.sum()) + reach * float(evidence.tail_mass[i + 1])
            accept_prob = mass / (mass + 1.0 - reach) if reach < 1.0 else 1.0
        if accept_uniforms[i] < accept_prob:
            num_accepted, reach_accepted = i + 1, reach
    if num_accepted == gamma:
        return _all_accepted(gamma, evidence)
    i = num_accepted
    return VerifyOutcome(i, _recover(supports[i], evidence, i, reach_accepted, noise))
