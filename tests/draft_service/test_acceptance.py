"""Acceptance model of the draft, before and after verify results."""

from __future__ import annotations

import numpy as np
import pytest

from draft_service.tree.acceptance import DraftAcceptance
from outrider.engine import SampledToken

SCORES = [2.0, 1.0, 0.5, -1.0]


def sampled(token_id: int = 0, scores: list[float] = SCORES) -> SampledToken:
    return SampledToken(token_id, None, np.arange(len(scores)), np.array(scores, np.float32))


@pytest.mark.parametrize("has_supports", [False, True])
def test_probabilities_add_up_to_1_and_fall(has_supports: bool) -> None:
    probs = DraftAcceptance().estimate(sampled(1), has_supports=has_supports)
    assert sorted(token for token, _ in probs) == [0, 1, 2, 3]
    assert sum(prob for _, prob in probs) <= 1 + 1e-9
    others = [prob for token, prob in probs if token != 1]
    assert others == sorted(others, reverse=True)


@pytest.mark.parametrize("token_id", [0, 2, 100])
def test_with_supports_probabilities_depend_on_rank_only(token_id: int) -> None:
    """Scores contain the noise of tokens still to be verified: they must not order the drafting."""
    model = DraftAcceptance()
    one, other = ([9.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1.0] * 8)
    predicted = [
        [c for _, c in model.estimate(sampled(t, scores), has_supports=True)]
        for t, scores in ((token_id, one), (token_id, other), (0, other))
    ]
    assert predicted[0] == predicted[1] == predicted[2]


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_predicted_and_observed_acceptance_agree(rate: float) -> None:
    """With the same noise in draft and target, the sharpness follows the verify results."""
    model, rng = DraftAcceptance(), np.random.default_rng(0)
    for _ in range(2000):
        predicted = dict(model.estimate(sampled(), has_supports=False))[0]
        model.observe([(predicted, bool(rng.random() < rate))], has_supports=False)
    assert dict(model.estimate(sampled(), has_supports=False))[0] == pytest.approx(rate, abs=0.08)


def test_with_supports_the_acceptance_rate_is_learnt() -> None:
    model = DraftAcceptance()
    for index in range(400):
        model.observe([(1.0, index % 4 > 0)], has_supports=True)
    assert dict(model.estimate(sampled(2), has_supports=True))[2] == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("is_accepted", [True, False])
def test_probability_1_teaches_nothing(is_accepted: bool) -> None:
    """Regression: sessions without look-ahead made the probabilities of all others sharper."""
    model = DraftAcceptance()
    before = model.estimate(sampled(), has_supports=False)
    for _ in range(100):
        model.observe([(1.0, is_accepted)], has_supports=False)
    assert model.estimate(sampled(), has_supports=False) == before


def test_one_candidate_is_certain() -> None:
    assert DraftAcceptance().estimate(sampled(0, [3.0]), has_supports=False) == [(0, 1.0)]
