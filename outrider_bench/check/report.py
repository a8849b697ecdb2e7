"""Report of `outrider check`: JSON, plot, verdicts. Tables are in `tables`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from outrider.errors import ConfigError
from outrider_bench.check import results
from outrider_bench.check.acceptance import Comparison
from outrider_bench.check.cost import TokenCost, token_costs
from outrider_bench.check.inspection import PairInspection
from outrider_bench.check.loops import Loops
from outrider_bench.check.options import CheckOptions
from outrider_bench.check.prediction import Prediction
from outrider_bench.check.prompts import Prompt
from outrider_bench.check.reencoded import LoopPredictor, loop_acceptances
from outrider_bench.check.self_test import SelfTestResult
from outrider_bench.check.verdict import Verdict, verdict

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.measuring.plots import Panel


@dataclass
class DraftCheck:
    """Everything found out about one draft. `draft` None: the target alone."""

    draft: str | None
    inspection: PairInspection
    options: CheckOptions
    self_test: list[SelfTestResult] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    loops: Loops = field(default_factory=Loops)

    @property
    def refused(self) -> list[str]:
        """Why the pair must not be used: refusals of the services, and failed self-tests."""
        failed = (
            f"self-test of {one.model}, {one.name}: "
            + (one.error or f"logits differ by {one.difference:.3g}, allowed are {one.allowed:.3g}")
            for one in self.self_test
            if not one.is_passed
        )
        return [*self.inspection.refused, *failed]

    @property
    def predictor(self) -> results.AnyPredictor | None:
        """None as long as the costs are not known."""
        cost, max_gamma = self.loops.cost, self.options.max_gamma
        if cost is not None and self.inspection.is_reencoded:
            return LoopPredictor(self.acceptances(), cost, max_gamma)
        if cost is None or not any(len(one.token_ids) > 1 for one in self.comparisons):
            return None
        if self.draft is None:
            return results.LookupPredictor(self.comparisons, self.prompts, cost, max_gamma)
        return results.Predictor(self.comparisons, cost, max_gamma)

    @property
    def lookup_uses(self) -> list[results.LookupUse]:
        """Empty with a draft, and as long as the costs are not known."""
        cost = self.loops.cost
        if self.draft is not None or cost is None:
            return []
        return results.lookup_uses(self.comparisons, self.prompts, cost, self.options.max_gamma)

    @property
    def speed_ups(self) -> list[results.SpeedUp]:
        """Empty as long as the costs are not known."""
        options, predictor = self.options, self.predictor
        if predictor is None:
            return []
        rtt_s = options.rtt_ms / 1000
        return results.speed_ups(predictor, self.loops, options.stream_list, rtt_s)

    @property
    def token_costs(self) -> list[TokenCost]:
        """Empty without --target-cost."""
        options, predictor = self.options, self.predictor
        if predictor is None or options.target_cost is None:
            return []

        def predict(speed_up: results.SpeedUp, num_drafts: int) -> Prediction:
            situation = replace(speed_up.prediction.situation, num_drafts=num_drafts)
            return predictor.predict(speed_up.temperature, situation)

        prices = options.target_cost, options.draft_cost or 0.0
        return token_costs(self.speed_ups, predict, *prices)

    @property
    def gamma(self) -> int:
        """γ of the tables: the best one for the first temperature and number of streams."""
        found = self.speed_ups
        return max(1, found[0].prediction.best_gamma) if found else min(4, self.options.max_gamma)

    def acceptances(self, *, by_task: bool = False) -> list[results.Acceptance]:
        if self.inspection.is_reencoded:
            return loop_acceptances(self.loops)
        return results.acceptances(self.comparisons, self.loops, self.gamma, by_task=by_task)

    @property
    def verdict(self) -> Verdict:
        return verdict(
            self.refused,
            self.speed_ups,
            self.acceptances(),
            results.pass_costs(self.loops),
            self.options.min_speed_up,
            self.token_costs,
            what="prompt lookup" if self.draft is None else None,
            flag=" with --target-tokenizer" if self.inspection.is_reencoded else "",
        )

    def to_dict(self) -> dict[str, Any]:
        costs = results.pass_costs(self.loops)
        return {
            "draft": self.draft,
            "verdict": self.verdict.text,
            "is_worth_it": self.verdict.is_worth_it,
            "score": self.verdict.score,
            "inspection": self.inspection.to_dict(),
            "self_test": [asdict(one) for one in self.self_test],
            "acceptance": [asdict(one) for one in self.acceptances()],
            "acceptance_by_task": [asdict(one) for one in self.acceptances(by_task=True)],
            "lookup": [asdict(one) for one in self.lookup_uses],
            "costs": [asdict(one) | {"ratio": one.ratio} for one in costs],
            "token_costs": [asdict(one) for one in self.token_costs],
            "speed_ups": [
                asdict(one) | {"predicted": one.prediction.speed_up, "off": one.off}
                for one in self.speed_ups
            ],
        }


@dataclass
class CheckReport:
    """Checks of one target with each draft. `stopped`: signal that ended the check."""

    options: CheckOptions
    checks: list[DraftCheck] = field(default_factory=list)
    stopped: Exception | None = None

    @property
    def ranked(self) -> list[DraftCheck]:
        """The best draft first."""
        return sorted(self.checks, key=lambda check: -check.verdict.score)

    @property
    def is_worth_it(self) -> bool:
        """Whether any draft is worth it."""
        return any(check.verdict.is_worth_it for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON of the report; the best draft first."""
        from outrider_bench.measuring.document import git_commit, machine, versions

        return {
            "command": shlex.join(["outrider", *sys.argv[1:]]),
            "git_commit": git_commit(),
            "machine": machine(),
            "versions": versions(),
            "target": self.options.target,
            "is_cut": self.stopped is not None,
            "is_worth_it": self.is_worth_it,
            "drafts": [check.to_dict() for check in self.ranked],
        }


def print_verdicts(console: Console, report: CheckReport) -> None:
    """Prints one line per draft, the best one first."""
    has_several = len(report.checks) > 1
    for place, check in enumerate(report.ranked, 1):
        found = check.verdict
        colour = "green" if found.is_worth_it else "red"
        name = f"{place}. {escape(check.draft)}: " if check.draft and has_several else ""
        console.print(f"[bold {colour}]{name}{escape(found.text)}[/]", soft_wrap=True)


def write_files(out: Path, report: CheckReport, console: Console) -> None:
    """Writes check.json and, if matplotlib is installed, check.svg. Raises ConfigError."""
    from outrider_bench.measuring.plots import draw, require_matplotlib

    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        (out / "check.json").write_text(text + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror or error}") from error
    console.print(f"[dim]{out / 'check.json'}[/]", soft_wrap=True)
    panels = _panels(report)
    if not panels:
        return
    try:
        require_matplotlib()
    except ConfigError as error:
        console.print(f"[yellow]no plot: {escape(str(error))}[/]", soft_wrap=True)
        return
    draw(out / "check.svg", "Speed-up over plain decoding", panels)
    console.print(f"[dim]{out / 'check.svg'}[/]", soft_wrap=True)


def _panels(report: CheckReport) -> list[Panel]:
    """Speed-up over γ at the fewest streams, and over streams; none without results."""
    from outrider_bench.measuring.plots import Line, Panel

    over_gamma, over_streams = [], []
    for check in report.ranked:
        name = f"{Path(check.draft or '').name}, " if len(report.checks) > 1 else ""
        found = check.speed_ups
        for temperature in dict.fromkeys(one.temperature for one in found):
            own = [one for one in found if one.temperature == temperature]
            title, first = f"{name}T = {temperature:g}", own[0].prediction
            gammas = range(len(first.ahead))
            over_gamma.append(Line(f"{title}, ahead", gammas, first.ahead, has_marks=False))
            over_gamma.append(Line(f"{title}, in turn", gammas, first.in_turn, has_marks=False))
            counts = [one.num_streams for one in own]
            speeds = [one.prediction.speed_up for one in own]
            over_streams.append(Line(f"{title}, predicted", counts, speeds))
            measured = [(one.num_streams, one.measured) for one in own if one.measured is not None]
            if measured:
                xs, ys = zip(*measured, strict=True)
                over_streams.append(Line(f"{title}, measured", xs, ys))
    if not over_gamma:
        return []
    num = min(report.options.stream_list)
    return [
        Panel(f"γ ({num} stream{'s' if num > 1 else ''})", "speed-up", over_gamma, level=1.0),
        Panel("streams", "speed-up", over_streams, is_log_x=True, level=1.0),
    ]
