"""Makes the quickstart pair: trains it, measures it, writes its card; prints progress.

If interrupted, leaves the models as they are and a card that reports it. `train` and `evaluate` do
the work.
"""

from __future__ import annotations

import sys
from pathlib import Path

from outrider_bench.distill.optimise import ENDLESS, TrainingEvent
from outrider_bench.quickstart.card import write_card, write_cut_card
from outrider_bench.quickstart.corpus import Corpus
from outrider_bench.quickstart.evaluate import EvaluationConfig, evaluate
from outrider_bench.quickstart.train import TrainingConfig, TrainingResult, train

_MINUTE_S = 60.0


def make(
    output_dir: Path,
    config: TrainingConfig | None = None,
    *,
    trained_target: Path | None = None,
    corpus: Corpus | None = None,
    evaluation: EvaluationConfig | None = None,
) -> TrainingResult:
    """Trains a pair into `output_dir`, with its card; prints one line per progress event.

    After Ctrl-C it measures the models trained so far and writes the card. A second Ctrl-C stops
    that too and raises KeyboardInterrupt.
    """
    config = config or TrainingConfig()
    printer = _ProgressPrinter(config, trains_target=trained_target is None)
    _print(printer.announcement())
    result = train(
        output_dir, config, corpus=corpus, trained_target=trained_target, progress=printer.show
    )
    if result.is_cut:
        _print(f"interrupted: {_remaining_files(result, output_dir)}")
    if not result.num_draft_steps:
        write_cut_card(output_dir, result.sentence(), printer.losses)
        return result
    _print("measuring the pair on held-out text takes a few minutes; Ctrl-C skips it")
    try:
        report = evaluate(output_dir, evaluation, corpus=corpus)
    except KeyboardInterrupt:
        write_cut_card(output_dir, result.sentence(), printer.losses)
        raise
    write_card(output_dir, report, config, steps=result.sentence())
    _print(f"{result.sentence()}\n{report}")
    return result


def _remaining_files(result: TrainingResult, output_dir: Path) -> str:
    """Which models an interrupted training has left."""
    if result.num_draft_steps:
        steps = f"the draft after {result.num_draft_steps} steps"
        return f"target and draft are in {output_dir} ({steps})"
    if result.num_target_steps:
        target = output_dir / "target"
        return (
            f"the target is in {target} after {result.num_target_steps} steps; there is no draft. "
            "The same command goes on. To train a draft for the target as it is: "
            f"outrider quickstart train --out {output_dir} --target {target}"
        )
    return "nothing has been trained yet"


class _ProgressPrinter:
    """Prints progress and the time left: from the limits first, then from the rate of each
    stage.
    """

    def __init__(self, config: TrainingConfig, *, trains_target: bool) -> None:
        draft = config.distill
        self._limits_s = {
            "target": config.target_limits.time_budget_s if trains_target else 0.0,
            "rollouts": draft.rollout_budget_s,
            "draft": draft.limits.time_budget_s,
        }
        # Last loss of each stage, in nats per token.
        self.losses: dict[str, float] = {}

    def announcement(self) -> str:
        limits = ", ".join(f"{name} {_minutes(s)}" for name, s in self._limits_s.items() if s)
        return (
            f"takes at most {_minutes(sum(self._limits_s.values()))} ({limits}) and some minutes "
            "before and after; Ctrl-C saves the models trained so far"
        )

    def show(self, event: TrainingEvent) -> None:
        if event.loss == event.loss:  # NaN: rollouts have no loss
            self.losses[event.stage] = event.loss
        loss = f" loss {event.loss:.4f}" if event.loss == event.loss else ""
        left_s = self._stage_left_s(event)
        stages = list(self._limits_s)
        later_s = sum(self._limits_s[name] for name in stages[stages.index(event.stage) + 1 :])
        left = "" if left_s is None else f", {_minutes(left_s)} left of this stage"
        if later_s and left_s is not None:
            left += f", at most {_minutes(left_s + later_s)} in all"
        of = f"/{event.num_steps}" if event.num_steps < ENDLESS else ""
        _print(f"{event.stage} {event.step}{of}{loss} {event.elapsed_s:.0f} s{left}")

    def _stage_left_s(self, event: TrainingEvent) -> float | None:
        """Seconds left of the stage, from its rate so far; at most its limit. None: unknown."""
        if not event.step:
            return None
        by_rate_s = event.elapsed_s / event.step * (event.num_steps - event.step)
        return max(0.0, min(by_rate_s, self._limits_s[event.stage] - event.elapsed_s))


def _minutes(seconds: float) -> str:
    return f"{seconds / _MINUTE_S:.0f} min" if seconds >= _MINUTE_S else f"{seconds:.0f} s"


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
