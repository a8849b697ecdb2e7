"""Prompt lookup replayed along texts: what it would bring, by the orchestrator's own parts."""

from __future__ import annotations

import numpy as np
import pytest

from outrider.replica import CostReport
from outrider_bench.check.lookup import predicted_lookup, replayed, round_seconds
from outrider_bench.check.prediction import PairCost, Situation

GAMMA = 8
# A pass costs the same for any number of tokens.
FLAT = PairCost(CostReport((1,), (0.02,)), CostReport(), 0.0, 0.0)


def random_ids(num: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 30_000, num).tolist()


def test_a_quote_of_the_prompt_is_written_in_whole_blocks() -> None:
    prompt = random_ids(200)
    rounds = replayed([(prompt, prompt[20:180])], round_seconds(FLAT, 1, GAMMA))
    assert rounds is not None
    assert rounds.tokens_per_round > 7
    assert rounds.alpha == 1.0
    assert rounds.speed_up == pytest.approx(rounds.tokens_per_round)


def test_new_text_costs_nothing() -> None:
    rounds = replayed([(random_ids(200), random_ids(160, 1))], round_seconds(FLAT, 1, GAMMA))
    assert rounds is not None
    assert rounds.speed_up == pytest.approx(1.0)
    assert (rounds.alpha, rounds.drafted_share) == (None, 0.0)


def test_a_prediction_rises_with_gamma_and_falls_where_tokens_are_dear() -> None:
    prompt = random_ids(200)
    texts = [(prompt, prompt[20:180])]
    found = predicted_lookup(texts, FLAT, Situation(1), GAMMA)
    assert found.ahead[0] == 1.0
    assert list(found.ahead) == sorted(found.ahead)
    assert found.best_gamma == GAMMA
    assert found.in_turn == found.ahead
    dear = PairCost(CostReport((1, 2), (0.02, 0.04)), CostReport(), 0.0, 0.0)
    assert predicted_lookup(texts, dear, Situation(1), GAMMA).speed_up < 1.05


def test_texts_of_one_token_have_no_rounds() -> None:
    assert replayed([([1, 2], [3])], [0.1, 0.1]) is None
