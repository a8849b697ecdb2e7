"""Results of a draft with another tokenizer, which re-encodes the target's text: of the real loop.

Its proposals are not token by token beside the target's, so nothing is compared along texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.sampling.formulas import acceptance_band, mean_acceptance_length
from outrider_bench.check.loops import Loops
from outrider_bench.check.prediction import (
    PairCost,
    Prediction,
    RoundShapes,
    Situation,
    predicted,
)
from outrider_bench.check.results import Acceptance


def loop_acceptances(loops: Loops) -> list[Acceptance]:
    """One entry per temperature, counted by the services at a fixed γ."""
    from outrider_bench.measuring.summary import Rounds, survival_by_position

    found = []
    for temperature, samples in loops.counted.items():
        rounds = Rounds.of(samples)
        if rounds is None or rounds.alpha is None:
            continue
        survival, gamma = survival_by_position(samples), max(1, round(rounds.mean_gamma))
        found.append(
            Acceptance(
                task="",
                temperature=temperature,
                num_tokens=sum(len(sample.token_ids) for sample in samples),
                alpha=rounds.alpha,
                agreement=None,
                band=acceptance_band(rounds.alpha),
                gamma=gamma,
                survival=survival,
                tokens_per_round=rounds.tokens_per_round,
                formula_tokens_per_round=mean_acceptance_length(rounds.alpha, gamma),
                loop_alpha=rounds.alpha,
                loop_survival=survival,
            )
        )
    return found


class LoopPredictor:
    """Predicts speed-ups of a draft that re-encodes the text, as `Predictor`.

    Its rounds are those of the real loop's α: nothing is drafted for a rejection.
    """

    def __init__(self, found: Sequence[Acceptance], cost: PairCost, max_gamma: int) -> None:
        self._cost = cost
        self._shapes = {
            one.temperature: RoundShapes.of_alpha(one.alpha, max_gamma, 0.0) for one in found
        }

    @property
    def temperatures(self) -> list[float]:
        return list(self._shapes)

    def predict(self, temperature: float, situation: Situation) -> Prediction:
        return predicted(self._cost, self._shapes[temperature], situation)
