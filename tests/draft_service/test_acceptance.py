"""How likely a token is said to be, before and after verdicts have taught it."""

from __future__ import annotations

import numpy as np
import pytest

from draft_service.tree.acceptance import DraftAcceptance
from outrider.engine import SampledToken

SCORES = [2.0, 1.0, 0.5, -1.0]


def drawn(token_id: int = 0, scores: list[float] = SCORES) -> SampledToken:
    return SampledToken(token_id, None, np.arange(len(scores)), np.array(scores, np.float32))


@pytest.mark.parametrize("has_supports", [False, True])
def test_chances_add_up_to_1_and_fall(has_supports: bool) -> None:
    chances = DraftAcceptance().of(drawn(1), has_supports=has_supports)
    assert sorted(token for token, _ in chances) == [0, 1, 2, 3]
    assert sum(prob for _, prob in chances) <= 1 + 1e-9
    others = [prob for token, prob in chances if token != 1]
    assert others == sorted(others, reverse=True)


@pytest.mark.parametrize("token_id", [0, 2, 100])
def test_with_supports_chances_are_a_matter_of_rank_alone(token_id: int) -> None:
    """Scores hold the noise of what is still to be judged: they must not order the drafting."""
    chances = DraftAcceptance()
    one, other = ([9.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1.0] * 8)
    said = [
        [c for _, c in chances.of(drawn(t, scores), has_supports=True)]
        for t, scores in ((token_id, one), (token_id, other), (0, other))
    ]
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("stands", [0.5, 0.9])
def test_what_is_said_is_what_comes(stands: float) -> None:
    """Where draft and target draw with the same noise: the sharpness follows the verdicts."""
    chances, prob = DraftAcceptance(), np.random.default_rng(0)
    for _ in range(2000):
        said = dict(chances.of(drawn(), has_supports=False))[0]
        chances.judged([(said, bool(prob.random() < stands))], has_supports=False)
    assert dict(chances.of(drawn(), has_supports=False))[0] == pytest.approx(stands, abs=0.08)


def test_acceptance_is_learnt_where_tokens_are_drawn() -> None:
    chances = DraftAcceptance()
    for index in range(400):
        chances.judged([(1.0, index % 4 > 0)], has_supports=True)
    assert dict(chances.of(drawn(2), has_supports=True))[2] == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("stood", [True, False])
def test_what_was_certain_or_not_looked_at_teaches_nothing(stood: bool) -> None:
    """Found so: sessions without look-ahead made all others' chances ever sharper."""
    chances = DraftAcceptance()
    before = chances.of(drawn(), has_supports=False)
    for _ in range(100):
        chances.judged([(1.0, stood)], has_supports=False)
    assert chances.of(drawn(), has_supports=False) == before


def test_one_candidate_is_certain() -> None:
    assert DraftAcceptance().of(drawn(0, [3.0]), has_supports=False) == [(0, 1.0)]
