"""What the records of a phase meant: latencies, throughput, goodput, acceptance. Pure.

Names as in the field: α, the share of judged draft tokens that were accepted; τ, tokens of a
drafted round. Percentiles as numpy's default has them: linear between the two nearest.
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
    """Of seconds. `percentiles`: by PERCENTILES."""

    num: int
    mean: float
    std: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None without values."""
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
    """Of finished requests only; None: nobody had such a time. `itl_*`: see records."""

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
    """Sums over finished requests, as shares and means; None: there was nothing to divide by."""

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
        told = [r.speculation for r in records if r.is_ok and r.speculation is not None]
        if not told:
            return None
        num_drafts, accepted = _sum(told, "num_drafts"), _sum(told, "num_accepted_tokens")
        rounds = [count for one in told for count in enumerate(one.num_rounds_per_gamma)]
        waited, verified = _sum(told, "draft_wait_s"), _sum(told, "verify_s")
        rows = [one.num_rows for one in told if one.num_rows is not None]
        return cls(
            num_drafts=int(num_drafts),
            num_draft_tokens=int(_sum(told, "num_draft_tokens")),
            num_accepted_tokens=int(accepted),
            alpha=_ratio(accepted, accepted + _sum(told, "num_rejected_tokens")),
            tau=None if num_drafts == 0 else 1 + accepted / num_drafts,
            mean_gamma=_ratio(sum(g * n for g, n in rounds), sum(n for _, n in rounds)),
            hit_rate=_ratio(_sum(told, "num_lookahead_hits"), num_drafts),
            draft_wait_share=_ratio(waited, waited + verified),
            verify_rows=float(np.mean(rows)) if rows else None,
            per_position=_per_position(told, num_drafts),
        )


def _sum(told: Sequence[Speculation], name: str) -> float:
    return float(sum(getattr(one, name) for one in told))


def _per_position(told: Sequence[Speculation], num_drafts: float) -> tuple[float, ...]:
    """[i]: share of the drafted rounds in which draft token i was accepted."""
    most = max(len(one.num_accepted_per_pos) for one in told)
    sums = [0] * most
    for one in told:
        for place, num in enumerate(one.num_accepted_per_pos):
            sums[place] += num
    return tuple(num / num_drafts for num in sums) if num_drafts else ()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


@dataclass(frozen=True)
class Summary:
    """A phase, or several of one variant. Rates are per second of `duration_s`.

    Tokens of failed and cut requests count as tokens that were sent, their times as nothing.
    `attained`: share of the answered requests that kept the SLO.
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
    """Of all that came in [begin_s, end_s), whoever it was for."""
    num = sum(
        chunk.num_tokens
        for record in records
        for chunk in record.chunks
        if begin_s <= chunk.at_s < end_s
    )
    return num / max(end_s - begin_s, 1e-9)


def most_running(spans: Iterable[tuple[float, float]]) -> int:
    """The most of the half-open spans that cover one moment."""
    changes: Counter[float] = Counter()
    for begin, end in spans:
        changes[begin] += 1
        changes[end] -= 1
    return max(itertools.accumulate(changes[at] for at in sorted(changes)), default=0)


def mean_running(spans: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """How many of the spans cover a moment of [begin_s, end_s), in the mean."""
    covered = sum(max(0.0, min(end, end_s) - max(begin, begin_s)) for begin, end in spans)
    return covered / (end_s - begin_s)
