"""Metrics of a phase's records: latencies, throughput, goodput, acceptance. Pure.

α: accepted draft tokens over accepted plus rejected ones. τ: tokens per round with a draft.
Percentiles are numpy's default: linear between the two nearest values.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from outrider_bench.loadtest.records import CUT, OK, Record, Speculation
from outrider_bench.loadtest.slo import Slo

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """Distribution of times in seconds. `percentiles`: by PERCENTILES."""

    num: int
    mean: float
    std: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None if there are no values."""
        if not values:
            return None
        found = np.percentile(values, PERCENTILES)
        return cls(
            num=len(values),
            mean=float(np.mean(values)),
            std=float(np.std(values)),
            percentiles=dict(zip(PERCENTILES, map(float, found), strict=True)),
        )

    @property
    def p50(self) -> float:
        return self.percentiles[50]

    @property
    def p99(self) -> float:
        return self.percentiles[99]


@dataclass(frozen=True)
class Latencies:
    """Latencies of finished requests; None: no request has it. See `records` for `itl_*`."""

    ttft: Distribution | None
    tpot: Distribution | None
    itl_chunk: Distribution | None
    itl_token: Distribution | None
    e2e: Distribution | None

    @classmethod
    def of(cls, records: Iterable[Record]) -> Latencies:
        done = [record for record in records if record.is_ok]

        def each(value: Callable[[Record], float | None]) -> Distribution | None:
            return Distribution.of([v for v in map(value, done) if v is not None])

        return cls(
            ttft=each(lambda record: record.ttft_s),
            tpot=each(lambda record: record.tpot_s),
            itl_chunk=Distribution.of([gap for record in done for gap in record.chunk_gaps_s]),
            itl_token=Distribution.of([gap for record in done for gap in record.token_gaps_s]),
            e2e=each(lambda record: record.e2e_s),
        )


@dataclass(frozen=True)
class Drafting:
    """Speculation over all finished requests; None: nothing to divide by."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    alpha: float | None
    tau: float | None
    mean_gamma: float | None
    hit_rate: float | None
    draft_wait_share: float | None
    verify_rows: float | None
    per_position: tuple[float, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Drafting | None:
        stats = [r.speculation for r in records if r.is_ok and r.speculation is not None]
        if not stats:
            return None
        num_drafts, accepted = _sum(stats, "num_drafts"), _sum(stats, "num_accepted_tokens")
        rounds = [count for s in stats for count in enumerate(s.num_rounds_per_gamma)]
        waited, verified = _sum(stats, "draft_wait_s"), _sum(stats, "verify_s")
        rows = [s.num_rows for s in stats if s.num_rows is not None]
        return cls(
            num_drafts=int(num_drafts),
            num_draft_tokens=int(_sum(stats, "num_draft_tokens")),
            num_accepted_tokens=int(accepted),
            alpha=_ratio(accepted, accepted + _sum(stats, "num_rejected_tokens")),
            tau=None if num_drafts == 0 else 1 + accepted / num_drafts,
            mean_gamma=_ratio(sum(g * n for g, n in rounds), sum(n for _, n in rounds)),
            hit_rate=_ratio(_sum(stats, "num_lookahead_hits"), num_drafts),
            draft_wait_share=_ratio(waited, waited + verified),
            verify_rows=float(np.mean(rows)) if rows else None,
            per_position=_per_position(stats, num_drafts),
        )


def _sum(stats: Sequence[Speculation], name: str) -> float:
    return float(sum(getattr(s, name) for s in stats))


def _per_position(stats: Sequence[Speculation], num_drafts: float) -> tuple[float, ...]:
    """[i]: share of the rounds with a draft in which draft token i was accepted."""
    most = max(len(s.num_accepted_per_pos) for s in stats)
    sums = [0] * most
    for s in stats:
        for place, num in enumerate(s.num_accepted_per_pos):
            sums[place] += num
    return tuple(num / num_drafts for num in sums) if num_drafts else ()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


@dataclass(frozen=True)
class Summary:
    """Metrics of one phase, or of several of one variant. Rates are per second of `duration_s`.

    Tokens of failed and cut requests count as sent tokens; their latencies are left out.
    `attained`: share of the answered requests that met the SLO.
    """

    duration_s: float
    num_requests: int
    num_completed: int
    num_cut: int
    errors: dict[str, int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    requests_per_s: float
    tokens_per_s: float
    goodput_per_s: float | None
    attained: float | None
    latencies: Latencies
    lateness: Distribution | None
    drafting: Drafting | None

    @classmethod
    def of(cls, records: Iterable[Record], duration_s: float, slo: Slo | None = None) -> Summary:
        counted = list(records)
        done = [record for record in counted if record.is_ok]
        answered = [record for record in counted if record.status != CUT]
        num_tokens = sum(record.num_tokens for record in counted)
        num_good = sum(slo.is_met(record) for record in done) if slo else None
        seconds = max(duration_s, 1e-9)
        return cls(
            duration_s=duration_s,
            num_requests=len(counted),
            num_completed=len(done),
            num_cut=len(counted) - len(answered),
            errors=dict(Counter(r.status for r in answered if r.status != OK)),
            num_prompt_tokens=sum(record.prompt_len for record in done),
            num_cached_tokens=sum(record.num_cached_tokens for record in done),
            num_tokens=num_tokens,
            requests_per_s=len(done) / seconds,
            tokens_per_s=num_tokens / seconds,
            goodput_per_s=None if num_good is None else num_good / seconds,
            attained=None if num_good is None else num_good / max(1, len(answered)),
            latencies=Latencies.of(done),
            lateness=Distribution.of([record.lateness_s for record in answered]),
            drafting=Drafting.of(done),
        )


def tokens_per_s(records: Iterable[Record], begin_s: float, end_s: float) -> float:
    """Tokens per second received in [begin_s, end_s), of all requests."""
    num = sum(
        chunk.num_tokens
        for record in records
        for chunk in record.chunks
        if begin_s <= chunk.at_s < end_s
    )
    return num / max(end_s - begin_s, 1e-9)


def max_overlapping(spans: Iterable[tuple[float, float]]) -> int:
    """Maximum number of half-open spans that overlap at one moment."""
    changes: Counter[float] = Counter()
    for begin, end in spans:
        changes[begin] += 1
        changes[end] -= 1
    return max(itertools.accumulate(changes[at] for at in sorted(changes)), default=0)


def mean_running(spans: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """Mean number of spans that overlap a moment of [begin_s, end_s)."""
    covered = sum(max(0.0, min(end, end_s) - max(begin, begin_s)) for begin, end in spans)
    return covered / (end_s - begin_s)
