"""Makes the quickstart pair: trains, measures and describes it, and shows how long that takes.

Owns the progress and what an interrupted run leaves: the models as they are, and a card that says
so. The work itself is in `train` and `evaluate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from outrider_bench.quickstart.card import write_card, write_cut_card
from outrider_bench.quickstart.corpus import Corpus
from outrider_bench.quickstart.evaluate import EvaluationConfig, evaluate
from outrider_bench.quickstart.optimise import TrainingEvent
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
    """Trains a pair into `output_dir` with its card; prints progress, one line each.

    After Ctrl-C it measures and describes what there is; a second one ends that, too, by
    KeyboardInterrupt.
    """
    config = config or TrainingConfig()
    clock = _Clock(config, trains_target=trained_target is None)
    _say(clock.announcement())
    result = train(
        output_dir, config, corpus=corpus, trained_target=trained_target, progress=clock.show
    )
    if result.is_cut:
        _say(f"interrupted: {_left_by(result, output_dir)}")
    if not result.num_draft_steps:
        write_cut_card(output_dir, result.sentence(), clock.losses)
        return result
    _say("measuring the pair on held-out text: some minutes; Ctrl-C leaves it unmeasured")
    try:
        report = evaluate(output_dir, evaluation, corpus=corpus)
    except KeyboardInterrupt:
        write_cut_card(output_dir, result.sentence(), clock.losses)
        raise
    write_card(output_dir, report, vocab_size=config.vocab_size, steps=result.sentence())
    _say(f"{result.sentence()}\n{report}")
    return result


def _left_by(result: TrainingResult, output_dir: Path) -> str:
    if result.num_draft_steps:
        steps = f"the draft after {result.num_draft_steps} steps"
        return f"target and draft are in {output_dir} ({steps})"
    if result.num_target_steps:
        target = output_dir / "target"
        return (
            f"the target is in {target} after {result.num_target_steps} steps, there is no draft; "
            f"to train one: outrider quickstart train --out {output_dir} --target {target}"
        )
    return "nothing was trained yet"


class _Clock:
    """How long the stages take: their limits beforehand, their rate once they run."""

    def __init__(self, config: TrainingConfig, *, trains_target: bool) -> None:
        draft = config.distill
        self._limits_s = {
            "target": config.target_limits.time_budget_s if trains_target else 0.0,
            "rollouts": draft.rollout_budget_s,
            "draft": draft.limits.time_budget_s,
        }
        # The last of each stage, in nats a token.
        self.losses: dict[str, float] = {}

    def announcement(self) -> str:
        limits = ", ".join(f"{name} {_minutes(s)}" for name, s in self._limits_s.items() if s)
        return (
            f"takes at most {_minutes(sum(self._limits_s.values()))} ({limits}) and some minutes "
            "before and after; Ctrl-C saves what there is by then"
        )

    def show(self, event: TrainingEvent) -> None:
        if event.loss == event.loss:  # rollouts have none
            self.losses[event.stage] = event.loss
        loss = f" loss {event.loss:.4f}" if event.loss == event.loss else ""
        left_s = self._stage_left_s(event)
        stages = list(self._limits_s)
        later_s = sum(self._limits_s[name] for name in stages[stages.index(event.stage) + 1 :])
        left = "" if left_s is None else f", {_minutes(left_s)} left of this stage"
        if later_s and left_s is not None:
            left += f", at most {_minutes(left_s + later_s)} in all"
        _say(f"{event.stage} {event.step}/{event.num_steps}{loss} {event.elapsed_s:.0f} s{left}")

    def _stage_left_s(self, event: TrainingEvent) -> float | None:
        """By the steps so far; never more than the stage's limit."""
        if not event.step:
            return None
        by_rate_s = event.elapsed_s / event.step * (event.num_steps - event.step)
        return max(0.0, min(by_rate_s, self._limits_s[event.stage] - event.elapsed_s))


def _minutes(seconds: float) -> str:
    return f"{seconds / _MINUTE_S:.0f} min" if seconds >= _MINUTE_S else f"{seconds:.0f} s"


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()
