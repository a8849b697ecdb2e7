"""Trials of sampled verification, from a round's result: what is known before, and what happened.

With `rejection`, each draft token up to the first rejected one is a trial. With `block`
verification only two events have a probability that is known before: that all draft tokens are
accepted, and the first emitted token. For one draft token the methods are the same.
docs/concepts/audit.md derives the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.generation.observation import ObservedRound
from outrider.sampling.params import Verification
from outrider.sampling.support import Support

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AcceptanceTrial:
    """A draft token was `accepted` or not.

    `prob`: its acceptance probability. `mean_prob`: the same, before the draft token was sampled:
    Σ min(target_probs, draft_probs).
    """

    accepted: bool
    prob: float
    mean_prob: float


def acceptance_trials(
    committed: ObservedRound, verification: Verification
) -> Iterator[AcceptanceTrial]:
    """Yields the acceptance trials of a round with supports."""
    proposal, num_accepted = committed.proposal, committed.outcome.num_accepted
    assert proposal is not None, "the round has draft tokens"
    assert proposal.supports is not None, "they have supports"
    gamma, reach = len(proposal.token_ids), 1.0
    is_block = verification is Verification.BLOCK
    for i, (token_id, support) in enumerate(
        zip(proposal.token_ids, proposal.supports, strict=True)
    ):
        if not is_block and i > num_accepted:
            return
        target_probs = reach * committed.result.support_probs[i]
        index = support.index_of(token_id)
        prob = min(1.0, float(target_probs[index] / support.probs[index]))
        if is_block:
            reach = prob
        if not is_block or i == gamma - 1:
            mean_prob = min(1.0, float(np.minimum(target_probs, support.probs).sum()))
            yield AcceptanceTrial(i < num_accepted, prob, mean_prob)


def emitted_positions(
    committed: ObservedRound, verification: Verification, rng: np.random.Generator
) -> Iterator[float]:
    """Yields positions in [0, 1] of emitted tokens in the target's cumulative distribution.

    Uniform if the token is a sample of the target's distribution (randomised probability integral
    transform). Tokens that the draft overrates most come first, those outside its support last:
    wrong acceptance moves positions towards one end.
    """
    proposal, outcome, result = committed.proposal, committed.outcome, committed.result
    assert proposal is not None, "the round has draft tokens"
    assert proposal.supports is not None, "they have supports"
    own = () if outcome.next_token is None else (outcome.next_token,)
    emitted = (*proposal.token_ids[: outcome.num_accepted], *own)
    if verification is Verification.BLOCK:
        emitted = emitted[:1]
    for i, (token_id, support) in enumerate(zip(emitted, proposal.supports, strict=False)):
        yield _position(
            token_id, support, result.support_probs[i], float(result.tail_mass[i]), rng.random()
        )


def _position(
    token_id: int, support: Support, target_probs: Floats, tail_mass: float, uniform: float
) -> float:
    order = np.argsort(target_probs / support.probs, kind="stable")
    masses = np.append(target_probs[order], tail_mass)
    index = support.index_of(token_id)
    place = int(np.flatnonzero(order == index)[0]) if index >= 0 else len(order)
    return float((masses[:place].sum() + uniform * masses[place]) / masses.sum())
