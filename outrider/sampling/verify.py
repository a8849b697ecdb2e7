"""Accept or reject the draft tokens of one block: exact, from the target's reply by support.

For each draft position i the target gives its probabilities on the draft's support, the mass
outside it (`tail_mass`) and one draw from its own distribution outside it (`samples`). That is all
that speculative sampling needs: outside the support the draft's probability is zero, so the
residual max(p - q, 0) is p itself there. No approximation is made.

After a rejection one Gumbel-max over the whole residual gives the recovered token, with the noise
by which the target has drawn the sample: the argmax of log p + noise outside the support, thus the
outside's champion, so that the maximum over the support and the sample is the maximum over all. A
draft that knows the noise can foresee it. This is exact, for a position's noise is looked at once,
by the verdict that ends there: acceptance sees uniforms of its own, and the mass outside rather
than who was drawn from it.

Pure: uniforms and noise are arguments. Knows nothing of sessions, stops or randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.sampling.support import Support

Floats = npt.NDArray[np.float64]
# Standard Gumbel noise, float64 [n], of token ids int64 [n] at a draft position of the block.
Noise = Callable[[int, npt.NDArray[np.int64]], Floats]


@dataclass(frozen=True)
class VerifyInput:
    """The target's reply for a block of γ draft tokens.

    `target_probs[i]` float64 [len(supports[i])]; `tail_mass` float64 [γ]; `samples` γ + 1 token
    ids: outside the support at i < γ, from all tokens at γ. Only γ of them where the target could
    not run the last draft token: no bonus follows it. `tail_logprobs` float64 [γ]: log p of
    the samples at i < γ, -inf where nothing is outside; rounded to float32 they move a
    distribution by at most 2**-24 times its entropy in nats, about as its rounded probabilities do.
    """

    target_probs: Sequence[Floats]
    tail_mass: Floats
    tail_logprobs: Floats
    samples: Sequence[int]


@dataclass(frozen=True)
class VerifyOutcome:
    """`num_accepted` draft tokens stand and `next_token` follows them; None: nothing follows."""

    num_accepted: int
    next_token: int | None


def verify_equal(draft_token_ids: Sequence[int], samples: Sequence[int]) -> VerifyOutcome:
    """Accept while the target's own token is the draft's: greedy, and Gumbel-coupled sampling.

    Daliri, Musco, Suresh 2024 (arXiv 2408.07978): what is emitted is `samples` whatever the draft.
    """
    num_accepted = 0
    for token_id, sample in zip(draft_token_ids, samples, strict=False):
        if token_id != sample:
            break
        num_accepted += 1
    return VerifyOutcome(num_accepted, samples[num_accepted])


def _recover(support: Support, evidence: VerifyInput, i: int, reach: float, noise: Noise) -> int:
    """One draw from max(reach * target - draft, 0), normalised, at draft position i.

    By Gumbel-max: the argmax of log weight + noise has the law of the weights.
    """
    target_probs, tail = evidence.target_probs[i], float(evidence.tail_logprobs[i])
    residual = np.maximum(reach * target_probs - support.probs, 0.0)
    if tail == -math.inf and not residual.any():
        # Draft and target agree but for rounding, which alone has rejected: any law between
        # the two is right, and there is no sample outside the support.
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

    `accept_uniforms` in [0, 1): one per draft position. `noise`: as the samples were drawn with.
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
    """Block verification (Sun et al. 2024, arXiv 2403.10444, Algorithm 2): never accepts less.

    `reach` is the paper's p̂_i, the probability that the first i tokens may stand.
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
