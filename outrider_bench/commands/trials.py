"""Trials of `outrider bench scaling`: tiers, loads, expected gains, table, plot. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outrider.sampling.formulas import mean_acceptance_length
from outrider.settings.simulation import Simulation
from outrider_bench.check.prediction import PairCost, RoundShapes, Situation, predicted

if TYPE_CHECKING:
    from rich.table import Table

    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.plots import Panel
    from outrider_bench.measuring.summary import Rounds

# Tokens up to which a pass costs the same (bound by memory), and tokens that double its time.
_TARGET_TOKENS = (64, 256)
_DRAFT_TOKENS = (16, 64)
_MAX_GAMMA = 16
# Of a round, beyond the passes; `outrider bench rounds` measures about this much.
_OVERHEAD_S = 0.0015


@dataclass(frozen=True)
class Trial:
    """One point. `num_drafts` 0: plain decoding. `round_trip_ms`: network to the draft and back."""

    ratio: float
    alpha: float
    round_trip_ms: float
    num_sessions: int
    num_drafts: int

    @property
    def name(self) -> str:
        drafts = {0: "plain", 1: "1 draft"}.get(self.num_drafts, f"{self.num_drafts} drafts")
        return f"c {self.ratio:g}, {drafts}"


@dataclass(frozen=True)
class Run:
    """One repetition of a trial. `busy`: share of time in a pass, of each replica by name.

    `rows_per_pass`: verify requests per target pass.
    """

    blocks: list[Block]
    busy: dict[str, float]
    rows_per_pass: float

    @property
    def tokens_per_s(self) -> float:
        return sum(block.tokens_per_s for block in self.blocks)

    @property
    def draft_busy(self) -> float:
        """Mean over the draft replicas; 0 without any."""
        shares = [share for name, share in self.busy.items() if name != "target"]
        return statistics.fmean(shares) if shares else 0.0


@dataclass(frozen=True)
class Outcome:
    """A table row. Ratios are relative to plain decoding of the same number of sessions.

    `hidden` and `in_turn` are the expected gains of `expected_gain`, `predicted` is that of
    `outrider check`.
    """

    trial: Trial
    tokens_per_s: float
    over_plain: float
    hidden: float
    in_turn: float
    predicted: float
    target_busy: float
    draft_busy: float
    rows_per_pass: float
    rounds: Rounds


def simulated_tiers(pass_ms: float, ratio: float, alpha: float) -> tuple[Simulation, Simulation]:
    """Simulated target and draft: passes are memory-bound for few tokens, compute-bound for many.

    The draft's device is smaller: it is compute-bound at a quarter of the tokens.
    """

    def steps(ms: float, tokens: tuple[int, int]) -> tuple[tuple[int, float], ...]:
        return ((1, ms), (tokens[0], ms), (tokens[1], 2 * ms))

    target = Simulation(step_ms=steps(pass_ms, _TARGET_TOKENS))
    draft = Simulation(step_ms=steps(ratio * pass_ms, _DRAFT_TOKENS), survival=(alpha,))
    return target, draft


def expected_gain(pass_ms: float, trial: Trial, *, is_hidden: bool) -> float:
    """Expected gain over plain decoding, at the best γ.

    Hidden: each proposal is drafted during the previous pass, one chain per session. It takes γ + 1
    steps: γ tokens, and the guess of the token that it starts from. Not hidden: γ steps and the
    round trip between two passes.
    """
    target, draft = (tier.costs for tier in simulated_tiers(pass_ms, trial.ratio, trial.alpha))
    num = trial.num_sessions
    rows = num / max(1, trial.num_drafts)
    step_s = draft.pass_s(rows, rows)

    def gain(gamma: int) -> float:
        pass_s = target.pass_s(num * (gamma + 1), num)
        hidden_s = max(pass_s, (gamma + 1) * step_s)
        in_turn_s = pass_s + gamma * step_s + trial.round_trip_ms / 1000
        round_s = hidden_s if is_hidden else in_turn_s
        return mean_acceptance_length(trial.alpha, gamma) * target.pass_s(num, num) / round_s

    return max([1.0, *map(gain, range(1, _MAX_GAMMA + 1))])


def predicted_gain(pass_ms: float, trial: Trial) -> float:
    """Gain over plain decoding as `outrider check` predicts it."""
    target, draft = simulated_tiers(pass_ms, trial.ratio, trial.alpha)
    cost = PairCost(target.costs, draft.costs, _OVERHEAD_S, _OVERHEAD_S)
    # The target emits the draft's first choice, or one of the next.
    shapes = RoundShapes.of_alpha(trial.alpha, _MAX_GAMMA, sum(draft.ranks))
    situation = Situation(trial.num_sessions, trial.round_trip_ms / 1000, trial.num_drafts)
    return predicted(cost, shapes, situation).speed_up


def summarised(pass_ms: float, runs: dict[Trial, list[Run]]) -> list[Outcome]:
    """Medians over the repetitions, in the order of the trials."""
    from outrider_bench.measuring.summary import Rounds

    rates = {trial: statistics.median(r.tokens_per_s for r in own) for trial, own in runs.items()}
    plain = {trial.num_sessions: rate for trial, rate in rates.items() if trial.num_drafts == 0}
    outcomes = []
    for trial, own in runs.items():
        rounds = Rounds.of(s for run in own for block in run.blocks for s in block.samples)
        assert rounds is not None, "the orchestrator tells of every output"
        is_plain = trial.num_drafts == 0
        outcomes.append(
            Outcome(
                trial=trial,
                tokens_per_s=rates[trial],
                over_plain=rates[trial] / plain[trial.num_sessions],
                hidden=1.0 if is_plain else expected_gain(pass_ms, trial, is_hidden=True),
                in_turn=1.0 if is_plain else expected_gain(pass_ms, trial, is_hidden=False),
                predicted=1.0 if is_plain else predicted_gain(pass_ms, trial),
                target_busy=statistics.median(run.busy["target"] for run in own),
                draft_busy=statistics.median(run.draft_busy for run in own),
                rows_per_pass=statistics.median(run.rows_per_pass for run in own),
                rounds=rounds,
            )
        )
    return outcomes


def result(outcome: Outcome) -> dict[str, Any]:
    """Entry of the JSON document."""
    entry = asdict(outcome)
    point: dict[str, Any] = entry.pop("trial")
    return point | entry


def panels(outcomes: Sequence[Outcome]) -> list[Panel]:
    """Gain at each round trip, and utilization of the drafts at the first; for the highest α."""
    from outrider_bench.measuring.plots import Line, Panel

    alpha = max(outcome.trial.alpha for outcome in outcomes)
    shown = [o for o in outcomes if o.trial.num_drafts and o.trial.alpha == alpha]

    def lines(round_trip_ms: float, value: Callable[[Outcome], float]) -> list[Line]:
        own = [o for o in shown if o.trial.round_trip_ms == round_trip_ms]
        groups = {name: [o for o in own if o.trial.name == name] for name in _names(own)}
        return [
            Line(name, [o.trial.num_sessions for o in group], [value(o) for o in group])
            for name, group in groups.items()
        ]

    round_trips = list(dict.fromkeys(o.trial.round_trip_ms for o in shown))
    gains = [
        Panel(
            f"sessions (α {alpha:g}, round trip {ms:g} ms)",
            "over plain",
            lines(ms, lambda o: o.over_plain),
            is_log_x=True,
            level=1.0,
        )
        for ms in round_trips
    ]
    busy = lines(round_trips[0], lambda o: 100 * o.draft_busy)
    return [*gains, Panel("sessions", "drafts busy, %", busy, is_log_x=True)]


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.trial.name for outcome in outcomes))


def table(outcomes: Sequence[Outcome]) -> Table:
    """Table with a row for each outcome."""
    from outrider_bench.measuring import show

    columns = (
        "α, c, drafts",
        "sessions",
        "RTT ms",
        "tokens/s",
        "over plain",
        "hidden",
        "sequential",
        "predicted",
    )
    seen = ("γ", "τ", "hits", "waiting", "target busy", "drafts busy", "requests/pass")
    shown = show.table("draft replicas for one target", (*columns, *seen))
    for outcome in outcomes:
        trial, rounds = outcome.trial, outcome.rounds
        shown.add_row(
            f"α {trial.alpha:g}, {trial.name}", str(trial.num_sessions),
            f"{trial.round_trip_ms:g}" if trial.num_drafts else "",
            show.number(outcome.tokens_per_s, 1), show.times(outcome.over_plain),
            show.times(outcome.hidden), show.times(outcome.in_turn),
            show.times(outcome.predicted),
            show.number(rounds.mean_gamma, 1), show.number(rounds.tokens_per_round, 1),
            show.share(rounds.hit_rate), show.share(rounds.draft_wait_share),
            show.share(outcome.target_busy), show.share(outcome.draft_busy),
            show.number(outcome.rows_per_pass, 1),
            end_section=_ends_section(outcomes, outcome),
        )  # fmt: skip
    return shown


def _ends_section(outcomes: Sequence[Outcome], outcome: Outcome) -> bool:
    place = outcomes.index(outcome) + 1
    trial = outcome.trial
    if place == len(outcomes):
        return False
    following = outcomes[place].trial
    return (following.alpha, following.ratio) != (trial.alpha, trial.ratio)
