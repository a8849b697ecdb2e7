"""`outrider bench explain-gamma`: shows the inputs of a choice of γ, as a table.

The orchestrator reports the GammaDecision. `orchestrator/speculation` makes the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outrider.cli.options import takes
from outrider.errors import InternalError
from outrider_bench.measuring.system import BenchOptions, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client.results import GammaDecision, SpeculationStats

_NUM_WARM_UP_TOKENS = 32


@takes(BenchOptions)
def explain_gamma(options: BenchOptions) -> None:
    """Generate one output and show why its last γ was chosen."""
    from outrider.cli.running import run
    from outrider_bench.measuring.show import bench_console

    console, explanation = bench_console(), Explanation()
    run(_measure(options.with_quick_defaults(), console, explanation))
    show_decision(console, explanation.measured[-1])
    if explanation.stopped is not None:
        console.print("this is the choice of the warm-up output", style="yellow")
        raise explanation.stopped


@dataclass
class Explanation:
    """Statistics of the warm-up output and of the measured one. `stopped`: see `Report`."""

    measured: list[SpeculationStats] = field(default_factory=list)
    stopped: Exception | None = None


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
    """Prints the last GammaDecision. Raises InternalError if there is none."""
    decision = stats.decision
    if decision is None:
        raise InternalError("no choice of γ was reported: the output had no drafts")
    console.print(decision_table(decision))
    console.print(
        f"rows per pass {decision.mean_num_rows:.1f} · draft step "
        f"{1e3 * decision.draft_step_s:.2f} ms · draft overhead "
        f"{1e3 * decision.draft_overhead_s:.2f} ms · target overhead "
        f"{1e3 * decision.target_overhead_s:.2f} ms · look-ahead hits "
        f"{100 * decision.lookahead_hit_rate:.0f} %",
        style="dim",
        highlight=False,
    )
    by_gamma = stats.num_rounds_per_gamma
    text = ", ".join(f"γ {gamma}: {num}" for gamma, num in enumerate(by_gamma) if num)
    console.print(f"rounds of this output by γ  {text}", style="dim", highlight=False)


def decision_table(decision: GammaDecision) -> Table:
    """Table with a row for each γ; the chosen ones are marked."""
    from outrider_bench.measuring.show import table

    shown = table(
        "choice of γ" if not decision.is_fixed else "γ, fixed by the request",
        ("γ", "all accepted", "target pass ms", "tokens/s, in time", "", "tokens/s, waiting", ""),
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
