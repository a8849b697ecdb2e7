"""`outrider bench explain-gamma`: what a choice of γ was made of.

Owns the table of a GammaDecision; the choice is the orchestrator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outrider.cli.failures import Signalled
from outrider.cli.options import takes
from outrider.errors import InternalError
from outrider_bench.measuring.system import BenchOptions, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.v1.orchestrator_pb2 import GammaDecision, SpeculationStats

_NUM_WARM_UP_TOKENS = 32


@takes(BenchOptions)
def explain_gamma(options: BenchOptions) -> None:
    """Run one output and show what its last γ was chosen by."""
    from outrider.cli.running import run
    from outrider_bench.measuring.show import bench_console

    console, explanation = bench_console(), Explanation()
    run(_measure(options.with_quick_defaults(), console, explanation))
    show_decision(console, explanation.measured[-1])
    if explanation.stopped is not None:
        console.print("this is the warm-up's choice", style="yellow")
        raise explanation.stopped


@dataclass
class Explanation:
    """Of the warm-up's output, and of the measured one. `stopped` as of a Report."""

    measured: list[SpeculationStats] = field(default_factory=list)
    stopped: Signalled | None = None


async def _measure(options: BenchOptions, console: Console, explanation: Explanation) -> None:
    from outrider_bench.measuring.load import one_output, run
    from outrider_bench.measuring.show import progress
    from outrider_bench.measuring.workload import adaptive

    measured = explanation.measured
    warm_up = (1, options.max_tokens / _NUM_WARM_UP_TOKENS)
    async with measured_system(options, console) as system:
        system.require_draft()
        with progress(console, 2, explanation, measured, warm_up=warm_up) as step:
            for name, num in (("warm-up", _NUM_WARM_UP_TOKENS), ("output", options.max_tokens)):
                step(f"{name}: {num} tokens")
                sample = await run(system, one_output(system, adaptive(), 0, num))
                assert sample.stats is not None, "the orchestrator reports on every output"
                measured.append(sample.stats)


def show_decision(console: Console, stats: SpeculationStats) -> None:
    """Raises InternalError where the orchestrator told none."""
    if not stats.HasField("decision"):
        raise InternalError("the orchestrator told no choice of γ: the output had no draft")
    decision = stats.decision
    console.print(decision_table(decision))
    console.print(
        f"rows {decision.mean_num_rows:.1f} · draft step {1e3 * decision.draft_step_s:.2f} ms · "
        f"beyond the draft's steps {1e3 * decision.draft_overhead_s:.2f} ms · beyond the target's "
        f"pass {1e3 * decision.target_overhead_s:.2f} ms · proposals here in time "
        f"{100 * decision.lookahead_hit_rate:.0f} %",
        style="dim",
        highlight=False,
    )
    by_gamma = stats.num_rounds_per_gamma
    told = ", ".join(f"γ {gamma}: {num}" for gamma, num in enumerate(by_gamma) if num)
    console.print(f"rounds of this output  {told}", style="dim", highlight=False)


def decision_table(decision: GammaDecision) -> Table:
    """One row for each γ; the chosen ones marked."""
    from outrider_bench.measuring.show import table

    shown = table(
        "γ, chosen" if not decision.is_fixed else "γ, fixed by the request",
        ("γ", "all accepted", "target pass ms", "tokens/s, here", "", "tokens/s, waited for", ""),
    )
    num_gammas = max(map(len, (decision.tokens_per_s, decision.target_step_s)))
    chosen = "[bold green]◀ chosen[/]"
    for gamma in range(num_gammas):
        shown.add_row(
            str(gamma),
            _entry(decision.survival, gamma - 1, ".2f"),
            _entry([1e3 * s for s in decision.target_step_s], gamma, ".2f"),
            _entry(decision.tokens_per_s, gamma, ".1f"),
            chosen if gamma == decision.gamma else "",
            _entry(decision.waiting_tokens_per_s, gamma, ".1f"),
            chosen if gamma == decision.waiting_gamma else "",
        )
    return shown


def _entry(values: Sequence[float], index: int, form: str) -> str:
    return format(values[index], form) if 0 <= index < len(values) else ""
