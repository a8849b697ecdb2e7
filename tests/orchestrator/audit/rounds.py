"""Rounds of sampled verification with random distributions, verified as the orchestrator does."""

from __future__ import annotations

import numpy as np

from orchestrator.generation.observation import ObservedRound
from orchestrator.speculation.verification import Proposal, VerifyResult, verify_proposal
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import target_gumbels
from outrider.sampling.support import Support

VOCAB_SIZE = 12
_SUPPORT_SIZE = 6


def random_round(
    rng: np.random.Generator,
    verification: Verification,
    gamma: int,
    *,
    planted_bias: float = 0.0,
    is_draft_honest: bool = True,
) -> ObservedRound:
    """A round at a random seed. `is_draft_honest` False: the draft proposes its best tokens."""
    seed, base_len = int(rng.integers(1 << 62)), 5
    token_ids, supports, probs, tails, samples, tail_logprobs = [], [], [], [], [], []
    for i in range(gamma + 1):
        logits = 1.5 * rng.normal(size=VOCAB_SIZE)
        target_probs = np.exp(logits) / np.exp(logits).sum()
        scores = np.log(target_probs) + target_gumbels(seed, base_len + i, np.arange(VOCAB_SIZE))
        if i == gamma:
            samples.append(int(scores.argmax()))
            break
        weights = np.exp(logits + 0.7 * rng.normal(size=VOCAB_SIZE))
        ids = np.argsort(-weights)[:_SUPPORT_SIZE]
        support = Support.normalised(ids, weights[ids].astype(np.float32))
        token_ids.append(support.sample(rng.random()) if is_draft_honest else int(ids[0]))
        scores[ids] = -np.inf
        samples.append(int(scores.argmax()))
        supports.append(support)
        probs.append(target_probs[ids])
        tails.append(1 - target_probs[ids].sum())
        tail_logprobs.append(np.log(target_probs[samples[-1]]))
    proposal = Proposal(base_len, tuple(token_ids), tuple(supports))
    result = VerifyResult(samples, probs, np.array(tails), np.array(tail_logprobs))
    params = SamplingParams(seed=seed)
    outcome = verify_proposal(proposal, result, params, verification, base_len, planted_bias)
    return ObservedRound(base_len, proposal, result, outcome, None)
