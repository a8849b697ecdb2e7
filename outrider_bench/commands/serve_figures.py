"""Plots of the report page of a load test, as SVG text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from outrider_bench.commands.serve_options import ON
from outrider_bench.loadtest.measures import Drafting, mean_running
from outrider_bench.loadtest.phase_results import PhaseResult, Probe
from outrider_bench.loadtest.records import Record
from outrider_bench.measuring.plots import Line, Panel, svg

_NUM_POINTS = 200

# Stretches by variant.
Stretches = dict[str, list[PhaseResult]]


def figures(by_variant: Stretches, probes: Sequence[Probe], attain: float) -> list[tuple[str, str]]:
    """(title, SVG) in the order of the page; plots without data are left out."""
    drawn = [
        ("Latency: share of requests that took at most this long", _latency_panels(by_variant)),
        ("Inter-token latency: per message and per token", _gap_panels(by_variant)),
        ("Over time, first phase of each variant", _time_panels(by_variant)),
        ("Draft tokens", _draft_panels(by_variant)),
        ("Search for the highest rate", _probe_panels(probes, attain)),
    ]
    full = [(title, [panel for panel in panels if panel.lines]) for title, panels in drawn]
    return [(title, svg("", panels)) for title, panels in full if panels]


def _records(results: Iterable[PhaseResult]) -> list[Record]:
    return [record for result in results for record in result.records if record.is_ok]


def _shares(name: str, values: Iterable[float | None], scale: float = 1.0) -> list[Line]:
    """A cumulative distribution as a line; none without values."""
    known = sorted(scale * value for value in values if value is not None)
    if not known:
        return []
    places = [round(i * (len(known) - 1) / _NUM_POINTS) for i in range(_NUM_POINTS + 1)]
    ys = [100 * i / _NUM_POINTS for i in range(_NUM_POINTS + 1)]
    return [Line(name, [known[place] for place in places], ys, has_marks=False)]


def _latency_panels(by_variant: Stretches) -> list[Panel]:
    def lines(value: Callable[[Record], float | None], scale: float) -> list[Line]:
        return [
            line
            for name, results in by_variant.items()
            for line in _shares(name, map(value, _records(results)), scale)
        ]

    return [
        Panel("time to first token, ms", "% of requests", lines(lambda r: r.ttft_s, 1e3)),
        Panel("time per output token, ms", "", lines(lambda r: r.tpot_s, 1e3)),
        Panel("end-to-end, s", "", lines(lambda r: r.e2e_s, 1.0)),
    ]


def _gap_panels(by_variant: Stretches) -> list[Panel]:
    def lines(gaps: Callable[[Record], list[float]]) -> list[Line]:
        return [
            line
            for name, results in by_variant.items()
            for line in _shares(name, (g for r in _records(results) for g in gaps(r)), 1e3)
        ]

    return [
        Panel("between messages, ms", "% of gaps", lines(lambda r: r.chunk_gaps_s)),
        Panel("per token, ms", "", lines(lambda r: r.token_gaps_s)),
    ]


def _time_panels(by_variant: Stretches) -> list[Panel]:
    """Tokens in each second, and the mean number of running requests in it."""
    rates, loads = [], []
    for name, results in by_variant.items():
        for result in results[:1]:
            seconds: Counter[int] = Counter()
            for record in result.records:
                for chunk in record.chunks:
                    seconds[math.floor(chunk.at_s)] += chunk.num_tokens
            xs = range(math.floor(result.duration_s))  # without the last, partial second
            if len(xs) > 1:
                spans = [(r.sent_s, r.ended_s) for r in result.records if r.ended_s is not None]
                running = [mean_running(spans, x, x + 1) for x in xs]
                rates.append(Line(name, list(xs), [seconds[x] for x in xs], has_marks=False))
                loads.append(Line(name, list(xs), running, has_marks=False))
    return [
        Panel("seconds", "tokens/s", rates),
        Panel("seconds", "running requests", loads),
    ]


def _draft_panels(by_variant: Stretches) -> list[Panel]:
    drafting = Drafting.of(_records(by_variant.get(ON, [])))
    if drafting is None or not drafting.num_drafts:
        return []
    positions = [100 * share for share in drafting.per_position]
    while positions and positions[-1] < 0.1:
        positions.pop()
    gammas: Counter[int] = Counter()
    for record in _records(by_variant[ON]):
        assert record.speculation is not None, "finished requests have statistics"
        for gamma, num in enumerate(record.speculation.num_rounds_per_gamma):
            gammas[gamma] += num
    total, xs = max(1, gammas.total()), range(max(gammas, default=0) + 1)
    return [
        Panel(
            "position of the draft token",
            "% accepted up to this position",
            [Line(ON, range(1, len(positions) + 1), positions)] if positions else [],
        ),
        Panel(
            "γ, draft tokens per round", "% of rounds",
            [Line(ON, list(xs), [100 * gammas[x] / total for x in xs])],
        ),
    ]  # fmt: skip


def _probe_panels(probes: Sequence[Probe], attain: float) -> list[Panel]:
    lines = []
    for name in dict.fromkeys(probe.variant for probe in probes):
        own = sorted((p for p in probes if p.variant == name), key=lambda probe: probe.rate)
        lines.append(Line(name, [p.rate for p in own], [100 * p.attained for p in own]))
    return [Panel("requests per second", "% met the SLO", lines, level=100 * attain)]
