"""Recovered tokens by simulation: with the services' noise they follow the residual.

The sample outside the support and the choice on the support use the same noise, `target_gumbels`;
only seeds vary. A draft that knows the noise can predict the recovered token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from outrider.sampling.random import Purpose, target_gumbels, token_gumbels
from outrider.sampling.support import Support
from outrider.sampling.verify import Noise, VerifyInput, verify_block, verify_tokens

from .keys import stream_keys
from .laws import Verify

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float64]

_FALSE_ALARM = 1e-6
_NUM_SEEDS = 6_000
_POSITION = 17
_REJECT = 1 - 2.0**-53
_TARGET = np.array([0.30, 0.22, 0.18, 0.12, 0.08, 0.10])
# Its first token is always rejected; others may be left of the support, some or none outside.
_SUPPORTS = {
    "one of six": ([3], [1.0]),
    "two": ([3, 0], [0.9, 0.1]),
    "three": ([2, 1, 5], [0.8, 0.1, 0.1]),
    "all but one": ([4, 0, 1, 2, 3], [0.6, 0.1, 0.1, 0.1, 0.1]),
    "all": ([4, 0, 1, 2, 3, 5], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]),
    "nothing left of it": ([0, 1], [0.5, 0.5]),
}


class _Answer(NamedTuple):
    """The target's result for one position."""

    on_support: Floats
    mass: float
    logprob: float
    sample: int


def _answer(target: Floats, support: Support, noise: Floats) -> _Answer:
    """float32, as sent; the sample is an argmax computed here."""
    outside = target.copy()
    outside[support.token_ids] = 0.0
    with np.errstate(divide="ignore"):
        sample = int(np.argmax(np.log(outside) + noise))
        logprob = float(np.float32(np.log(outside[sample])))
    on_support = target[support.token_ids].astype(np.float32).astype(np.float64)
    return _Answer(on_support, float(np.float32(outside.sum())), logprob, sample)


def _evidence(*answers: _Answer) -> VerifyInput:
    on_support, mass, logprobs, samples = zip(*answers, strict=True)
    return VerifyInput(on_support, np.array(mass), np.array(logprobs), [*samples, 0])


def _noise_of(seed: int) -> Noise:
    return lambda i, token_ids: target_gumbels(seed, _POSITION + i, token_ids)


def _noise(num: int, position: int) -> Floats:
    """float64 [num, vocab] of seeds 0 … num - 1."""
    keys = stream_keys(np.arange(num), Purpose.TARGET, position)
    noise: Floats = token_gumbels(keys, np.arange(len(_TARGET)))
    return noise


def _p_value(counts: Floats, residual: Floats) -> float:
    law = residual / residual.sum()
    assert counts[law < 1e-6].sum() == 0
    return float(stats.chisquare(counts[law > 0], counts.sum() * law[law > 0]).pvalue)


@pytest.mark.parametrize("name", _SUPPORTS)
def test_of_tokens(name: str) -> None:
    """χ² over 6,000 seeds of the token after a certain rejection; false alarm 1e-6 each."""
    ids, weights = _SUPPORTS[name]
    support = Support.normalised(np.array(ids), np.array(weights, np.float32))
    counts, noises = np.zeros(len(_TARGET)), _noise(_NUM_SEEDS, _POSITION)
    for seed in range(_NUM_SEEDS):
        evidence = _evidence(_answer(_TARGET, support, noises[seed]))
        outcome = verify_tokens(ids[:1], [support], evidence, [_REJECT], _noise_of(seed))
        assert outcome.num_accepted == 0
        counts[outcome.next_token] += 1
    draft = np.zeros(len(_TARGET))
    draft[ids] = support.probs
    assert _p_value(counts, np.maximum(_TARGET - draft, 0.0)) > _FALSE_ALARM


@pytest.mark.parametrize("name", _SUPPORTS)
def test_of_blocks(name: str) -> None:
    """As above after an accepted token whose p̂ is 0.6, less than certainty."""
    ids, weights = _SUPPORTS[name]
    support = Support.normalised(np.array(ids), np.array(weights, np.float32))
    first = Support(np.array([0, 1]), np.array([0.5, 0.5]))
    reach = _TARGET[0] / 0.5
    counts, noises = np.zeros(len(_TARGET)), _noise(_NUM_SEEDS, _POSITION + 1)
    before = _answer(_TARGET, first, _noise(1, _POSITION)[0])
    for seed in range(_NUM_SEEDS):
        evidence = _evidence(before, _answer(_TARGET, support, noises[seed]))
        drafts, accept = [0, ids[0]], [0.0, _REJECT]
        outcome = verify_block(drafts, [first, support], evidence, accept, _noise_of(seed))
        assert outcome.num_accepted == 1
        counts[outcome.next_token] += 1
    draft = np.zeros(len(_TARGET))
    draft[ids] = support.probs
    assert _p_value(counts, np.maximum(reach * _TARGET - draft, 0.0)) > _FALSE_ALARM


@pytest.mark.parametrize("verify", [verify_tokens, verify_block], ids=["tokens", "block"])
def test_it_is_the_argmax_over_the_whole_vocabulary(verify: Verify) -> None:
    """Equals the argmax of log residual + noise over all tokens, not only support and sample."""
    rng, gumbels = np.random.default_rng(1), _noise(300, _POSITION)
    for seed in range(300):
        target = rng.dirichlet(np.ones(6))
        size = int(rng.integers(1, 7))
        ids = rng.permutation(6)[:size]
        support = Support.normalised(ids, rng.dirichlet(np.ones(size)).astype(np.float32))
        draft = np.zeros(6)
        draft[ids] = support.probs
        rejected = int(ids[np.argmax(support.probs - target[ids])])
        if not draft[rejected] > target[rejected]:
            continue
        evidence = _evidence(_answer(target, support, gumbels[seed]))
        outcome = verify([rejected], [support], evidence, [_REJECT], _noise_of(seed))
        with np.errstate(divide="ignore"):
            scores = np.log(np.maximum(target - draft, 0.0)) + gumbels[seed]
        assert outcome.next_token == scores.argmax()
