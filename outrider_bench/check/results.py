"""Results of a check, computed from what was measured. Pure functions.

α teacher-forced is the mean of Σ min(target_probs, draft_probs) over the target's own texts; α of
the loop is accepted draft tokens over accepted and rejected ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider.sampling.formulas import acceptance_band, mean_acceptance_length
from outrider_bench.check import lookup, replay
from outrider_bench.check.acceptance import Comparison
from outrider_bench.check.loops import Loops, median_speed_up
from outrider_bench.check.prediction import (
    PairCost,
    Prediction,
    RoundShapes,
    Situation,
    predicted,
)
from outrider_bench.check.prompts import Prompt

# Candidates that the draft reports with every token, as in `outrider.engine.interface`, which
# imports torch; a test compares them.
NUM_CANDIDATES = 8
# Batch sizes at which the costs of passes are shown.
_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance along the target's own texts; `task` empty: all tasks.

    `survival` [k] and `tokens_per_round`, `formula_tokens_per_round`: of rounds with `gamma` draft
    tokens; the latter is (1 - α^(γ+1)) / (1 - α). `loop_alpha`, `loop_survival`: of the real loop;
    None and empty if it was not measured. `agreement` None: the draft re-encodes the text, and all
    values are those of the real loop.
    """

    task: str
    temperature: float
    num_tokens: int
    alpha: float
    agreement: float | None
    band: str
    gamma: int
    survival: tuple[float, ...]
    tokens_per_round: float
    formula_tokens_per_round: float
    loop_alpha: float | None = None
    loop_survival: tuple[float, ...] = ()


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass over one token of each of `num_rows` sequences."""

    num_rows: int
    target_s: float
    draft_s: float

    @property
    def ratio(self) -> float:
        return self.draft_s / self.target_s


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up over γ = 0 at one temperature and number of streams; None: not measured.

    `tokens_per_s` of all streams together, with the server's defaults. `off`: relative error of the
    prediction.
    """

    temperature: float
    num_streams: int
    prediction: Prediction
    measured: float | None = None
    least: float | None = None
    most: float | None = None
    plain_tokens_per_s: float | None = None
    tokens_per_s: float | None = None
    mean_gamma: float | None = None
    hit_rate: float | None = None
    tokens_per_round: float | None = None

    @property
    def off(self) -> float | None:
        if not self.measured:  # None, or 0: outputs so short that the streams never overlapped
            return None
        return self.prediction.speed_up / self.measured - 1

    @property
    def value(self) -> float:
        """Measured if possible, predicted otherwise; at most the tokens per round.

        A round with draft tokens takes at least as long as one without, so what a measurement
        exceeds its tokens per round by is noise of the machine.
        """
        if self.measured is None:
            return self.prediction.speed_up
        return min(self.measured, self.tokens_per_round or self.measured)


def acceptances(
    comparisons: Sequence[Comparison], loops: Loops, gamma: int, *, by_task: bool
) -> list[Acceptance]:
    """One entry per temperature, or per temperature and task."""
    groups: dict[tuple[str, float], list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.task if by_task else "", one.temperature), []).append(one)
    return [
        _acceptance(task, temperature, group, loops, gamma)
        for (task, temperature), group in groups.items()
        if any(len(one.overlap) > 1 for one in group)
    ]


def _acceptance(
    task: str, temperature: float, group: Sequence[Comparison], loops: Loops, gamma: int
) -> Acceptance:
    overlaps = [value for one in group for value in one.overlap]
    alpha = statistics.fmean(overlaps)
    rounds = replay.replayed([one.accepted for one in group], gamma)
    loop_alpha, loop_survival = (None, ()) if task else _of_loop(loops, temperature)
    return Acceptance(
        task=task,
        temperature=temperature,
        num_tokens=len(overlaps),
        alpha=alpha,
        agreement=statistics.fmean(float(value) for one in group for value in one.agrees),
        band=acceptance_band(alpha),
        gamma=gamma,
        survival=rounds.survival,
        tokens_per_round=rounds.tokens_per_round,
        formula_tokens_per_round=mean_acceptance_length(alpha, gamma),
        loop_alpha=loop_alpha,
        loop_survival=loop_survival,
    )


def _of_loop(loops: Loops, temperature: float) -> tuple[float | None, tuple[float, ...]]:
    """α and survival by position over all passes at this temperature."""
    from outrider_bench.measuring.summary import Rounds, survival_by_position

    samples = [sample for one in loops.at(temperature) for sample in one.served.samples]
    rounds = Rounds.of(samples)
    return (None if rounds is None else rounds.alpha), survival_by_position(samples)


def pass_costs(loops: Loops) -> list[PassCost]:
    """Costs by batch size; empty if they are not known or there is no draft."""
    cost = loops.cost
    if cost is None or not cost.draft.step_s[0]:
        return []
    sizes = ((num, cost.target.pass_s(num, num), cost.draft.pass_s(num, num))
             for num in _BATCH_SIZES)  # fmt: skip
    return [PassCost(num, target_s, draft_s) for num, target_s, draft_s in sizes if target_s > 0]


class AnyPredictor(Protocol):
    """Predicts speed-ups at the temperatures that it knows."""

    @property
    def temperatures(self) -> list[float]: ...

    def predict(self, temperature: float, situation: Situation) -> Prediction: ...


class Predictor:
    """Predicts speed-ups from the target's texts and the costs of passes."""

    def __init__(self, comparisons: Sequence[Comparison], cost: PairCost, max_gamma: int) -> None:
        self._cost = cost
        self._texts: dict[float, list[Comparison]] = {}
        for one in comparisons:
            self._texts.setdefault(one.temperature, []).append(one)
        self._shapes = {
            temperature: round_shapes(group, max_gamma)
            for temperature, group in self._texts.items()
        }

    @property
    def temperatures(self) -> list[float]:
        return list(self._texts)

    def predict(self, temperature: float, situation: Situation) -> Prediction:
        return predicted(self._cost, self._shapes[temperature], situation)


class LookupPredictor:
    """Predicts speed-ups of prompt lookup alone, as `Predictor`."""

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        prompts: Sequence[Prompt],
        cost: PairCost,
        max_gamma: int,
    ) -> None:
        self._cost, self._max_gamma = cost, max_gamma
        self._texts: dict[float, list[lookup.Text]] = {}
        for one in comparisons:
            text = prompts[one.prompt].token_ids, one.token_ids
            self._texts.setdefault(one.temperature, []).append(text)

    @property
    def temperatures(self) -> list[float]:
        return list(self._texts)

    def predict(self, temperature: float, situation: Situation) -> Prediction:
        texts = self._texts[temperature]
        return lookup.predicted_lookup(texts, self._cost, situation, self._max_gamma)


@dataclass(frozen=True)
class LookupUse:
    """Prompt lookup on the target's texts of one task, with one stream; `task` empty: all."""

    task: str
    temperature: float
    rounds: lookup.LookupRounds


def lookup_uses(
    comparisons: Sequence[Comparison], prompts: Sequence[Prompt], cost: PairCost, max_gamma: int
) -> list[LookupUse]:
    """One entry per temperature and task, then one per temperature."""
    groups: dict[tuple[str, float], list[lookup.Text]] = {}
    for one in comparisons:
        for task in (one.task, ""):
            text = prompts[one.prompt].token_ids, one.token_ids
            groups.setdefault((task, one.temperature), []).append(text)
    round_s = lookup.round_seconds(cost, 1, max_gamma)
    uses = []
    for (task, temperature), texts in groups.items():
        rounds = lookup.replayed(texts, round_s)
        if rounds is not None:
            uses.append(LookupUse(task, temperature, rounds))
    return sorted(uses, key=lambda use: not use.task)


def speed_ups(
    predictor: AnyPredictor, loops: Loops, streams: Iterable[int], rtt_s: float
) -> list[SpeedUp]:
    """One entry per temperature and number of streams."""
    return [
        _speed_up(temperature, predictor.predict(temperature, Situation(num, rtt_s)), loops)
        for temperature in predictor.temperatures
        for num in streams
    ]


def _speed_up(temperature: float, prediction: Prediction, loops: Loops) -> SpeedUp:
    from outrider_bench.measuring.summary import Rounds

    num = prediction.situation.num_streams
    passes = [one for one in loops.at(temperature, num) if one.has_rates]
    if not passes:
        return SpeedUp(temperature, num, prediction)
    rounds = Rounds.of(sample for one in passes for sample in one.served.samples)
    return SpeedUp(
        temperature,
        num,
        prediction,
        measured=median_speed_up(passes),
        least=min(one.speed_up for one in passes),
        most=max(one.speed_up for one in passes),
        plain_tokens_per_s=statistics.median(one.plain.tokens_per_s for one in passes),
        tokens_per_s=statistics.median(one.served.tokens_per_s for one in passes),
        mean_gamma=None if rounds is None else rounds.mean_gamma,
        hit_rate=None if rounds is None else rounds.hit_rate,
        tokens_per_round=None if rounds is None else rounds.tokens_per_round,
    )


def round_shapes(comparisons: Sequence[Comparison], max_gamma: int) -> RoundShapes:
    """Rounds replayed along the texts. At least one text must have two tokens."""
    rounds = [replay.replayed([one.accepted for one in comparisons], gamma)
              for gamma in range(1, max_gamma + 1)]  # fmt: skip
    tokens = [(rank, accepted) for one in comparisons
              for rank, accepted in zip(one.rank, one.accepted, strict=True)]  # fmt: skip
    rejected = sum(1 - accepted for _, accepted in tokens)
    foreseen = sum(1 - accepted for rank, accepted in tokens if rank < NUM_CANDIDATES)
    return RoundShapes(
        tokens=(1.0, *(one.tokens_per_round for one in rounds)),
        # Short texts have no rounds with many draft tokens.
        all_accepted=(
            1.0,
            *(one.survival[g] if g < len(one.survival) else 0.0 for g, one in enumerate(rounds)),
        ),
        foreseen_rejection=foreseen / rejected if rejected else 1.0,
        foreseen_bonus=sum(rank < NUM_CANDIDATES for rank, _ in tokens) / len(tokens),
    )
