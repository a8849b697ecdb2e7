"""Results of `outrider bench signals`: points, goals, table and plot. Pure functions.

A tier is a bottleneck if another replica of it raises throughput. The autoscaling signal of that
tier must then exceed its threshold. Signals and thresholds are those of
deploy/components/autoscaling. Draft: its queue, weighted by the share of late proposals. Target:
waiting verify requests and KV use. Each is a mean over replicas and time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from outrider_bench.measuring.document import Goal
    from outrider_bench.measuring.plots import Line, Panel

DRAFT_QUEUE = 8.0
TARGET_ROWS = 32.0
TARGET_KV = 0.75
MAX_REPLICAS = 3
# Gain of a second replica: at least, for the bottleneck; at most, for another tier.
_MIN_GAIN, _MAX_GAIN = 1.15, 1.1


@dataclass(frozen=True)
class Regime:
    """A load and two simulated tiers (format of `--simulate`).

    `bottleneck`: the tier that limits throughput; None: neither.
    """

    name: str
    bottleneck: str | None
    num_sessions: int
    target: str
    draft: str


# A pass costs the same up to 128 tokens: 32 verify requests of four, hence the threshold of 32.
_TARGET = "step_ms=1:80.0/128:80.0/512:320.0"
# Passes are twice as long for 64 sessions: otherwise Python in the draft limits on two cores.
_SLOW_TARGET = "step_ms=1:160.0/128:160.0/512:640.0"
_QUICK_DRAFT = "step_ms=1:2.0/128:2.0/512:8.0,survival=0.8"
# A step costs the same up to 8 rows, the draft's threshold; then it grows with the rows.
_SLOW_DRAFT = "step_ms=1:12.0/8:12.0/64:96.0,survival=0.8"

REGIMES = (
    Regime("draft short", "draft", 24, _TARGET, _SLOW_DRAFT),
    Regime("target short", "target", 64, _SLOW_TARGET, _QUICK_DRAFT),
    Regime("neither short", None, 8, _TARGET, _QUICK_DRAFT),
)


@dataclass(frozen=True)
class Point:
    """A regime with a number of replicas, and its measurements.

    `draft_queue`, `waiting_rows`, `kv_use`: means over time and replicas. `hit_rate`: share of
    drafted rounds whose proposal arrived in time; 1 without drafted rounds.
    """

    regime: str
    num_targets: int
    num_drafts: int
    num_sessions: int
    tokens_per_s: float
    draft_queue: float
    hit_rate: float
    waiting_rows: float
    kv_use: float
    mean_gamma: float | None
    errors: dict[str, int]

    @property
    def draft_signal(self) -> float:
        """Draft signal over its threshold: above 1 requests replicas."""
        return self.draft_queue * (2 - self.hit_rate) / DRAFT_QUEUE

    @property
    def target_signal(self) -> float:
        """Target signal over its threshold: the larger of waiting requests and KV use."""
        return max(self.waiting_rows / TARGET_ROWS, self.kv_use / TARGET_KV)


def sizes(most: int) -> list[tuple[int, int]]:
    """(targets, drafts): one of each, then up to `most` of either tier."""
    more = range(2, most + 1)
    return [(1, 1), *((1, num) for num in more), *((num, 1) for num in more)]


def goals(points: Sequence[Point]) -> list[Goal]:
    """Goals: a tier's signal requests replicas if and only if the tier is the bottleneck."""
    from outrider_bench.measuring.document import Goal

    goals: list[Goal] = []
    for regime in REGIMES:
        own = {(p.num_targets, p.num_drafts): p for p in points if p.regime == regime.name}
        one = own.get((1, 1))
        for tier, two in (("draft", own.get((1, 2))), ("target", own.get((2, 1)))):
            gain = two.tokens_per_s / one.tokens_per_s if one and two else None
            signal: float | None = getattr(one, f"{tier}_signal") if one else None
            is_bottleneck = tier == regime.bottleneck
            bound = _MIN_GAIN if is_bottleneck else _MAX_GAIN
            gained = f"{regime.name}: tokens/s with a second {tier}"
            goals.append(Goal(gained, bound, gain, is_most=not is_bottleneck))
            seen = f"{regime.name}: signal of the {tier} over its threshold"
            goals.append(Goal(seen, 1.0, signal, is_most=not is_bottleneck))
    return goals


def panels(points: Sequence[Point]) -> list[Panel]:
    """Panels by number of replicas: tokens/s relative to one of each, and both signals."""
    from outrider_bench.measuring.plots import Line, Panel

    first = {p.regime: p for p in points if p.num_targets == p.num_drafts == 1}

    def lines(value: Callable[[Point], float]) -> list[Line]:
        drawn = []
        for regime in first:
            for tier in ("draft", "target"):
                own = [p for p in points if p.regime == regime and _others(p, tier) == 1]
                own.sort(key=lambda point: _num(point, tier))
                xs, ys = [_num(p, tier) for p in own], [value(p) for p in own]
                drawn.append(Line(f"{regime}: more {tier}s", xs, ys))
        return drawn

    return [
        Panel(
            "replicas of the tier",
            "tokens/s over one of each",
            lines(lambda p: p.tokens_per_s / first[p.regime].tokens_per_s),
            level=1.0,
        ),
        Panel(
            "replicas of the tier",
            "draft signal over its threshold",
            lines(lambda p: p.draft_signal),
            level=1.0,
        ),
        Panel(
            "replicas of the tier",
            "target signal over its threshold",
            lines(lambda p: p.target_signal),
            level=1.0,
        ),
    ]


def _num(point: Point, tier: str) -> int:
    return point.num_drafts if tier == "draft" else point.num_targets


def _others(point: Point, tier: str) -> int:
    return point.num_targets if tier == "draft" else point.num_drafts


def table(points: Sequence[Point]) -> Table:
    """Table with a row for each point; signals above their thresholds are bold."""
    from outrider_bench.measuring import show

    columns = ("", "sessions", "targets", "drafts", "tokens/s", "γ")
    signals = ("draft queue", "hits", "draft signal", "waiting", "KV use", "target signal")
    shown = show.table("the bottleneck tier and the autoscaling signals", (*columns, *signals))
    for place, point in enumerate(points):
        following = points[place + 1].regime if place + 1 < len(points) else point.regime
        shown.add_row(
            point.regime, str(point.num_sessions), str(point.num_targets), str(point.num_drafts),
            show.number(point.tokens_per_s, 1), show.number(point.mean_gamma, 1),
            show.number(point.draft_queue, 1), show.share(point.hit_rate),
            _marked(point.draft_signal),
            show.number(point.waiting_rows, 1), show.share(point.kv_use),
            _marked(point.target_signal),
            end_section=following != point.regime,
        )  # fmt: skip
    return shown


def _marked(signal: float) -> str:
    return f"[bold]{signal:.2f}[/]" if signal > 1 else f"{signal:.2f}"
