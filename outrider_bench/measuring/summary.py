"""Statistics over samples: medians, acceptance, shares of time. Pure functions.

α is the acceptance rate: accepted draft tokens over accepted and rejected ones. τ is the number of
tokens per round with a draft.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outrider.client import SpeculationStats
from outrider_bench.measuring.load import Sample


@dataclass(frozen=True)
class Speed:
    """Tokens per second: median, minimum and maximum over outputs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> Speed:
        return cls(statistics.median(rates), min(rates), max(rates))


@dataclass(frozen=True)
class Rounds:
    """Shares and means over all rounds except the first of each output; None: no such rounds.

    `limit_tokens_per_s` is the rate of one stream if the target were never idle: tokens per round
    over the duration of a pass (τ / T_target if all rounds have drafts). `limit_share` is the
    achieved fraction of it, which is the share of time in which the target was busy.
    """

    alpha: float | None
    tau: float | None
    hit_rate: float | None
    mean_gamma: float
    tokens_per_round: float
    target_step_s: float
    verify_s: float
    draft_wait_share: float | None
    limit_tokens_per_s: float | None
    limit_share: float | None

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Rounds | None:
        """None without statistics (peers report none)."""
        known = [(sample, sample.stats) for sample in samples if sample.stats is not None]
        if not known:
            return None
        stats = [entry for _, entry in known]
        num_tokens = sum(len(sample.token_ids) - 1 for sample, _ in known)
        after_first_s = sum(
            (len(sample.token_ids) - 1) / sample.tokens_per_s
            for sample, _ in known
            if sample.tokens_per_s > 0
        )
        num_rounds = sum(s.num_rounds - 1 for s in stats)
        num_drafts = sum(s.num_drafts for s in stats)
        accepted = sum(s.num_accepted_tokens for s in stats)
        compared = accepted + sum(s.num_rejected_tokens for s in stats)
        step_s = sum(s.target_step_s for s in stats)
        verify_s = sum(s.verify_s for s in stats)
        wait_s = sum(s.draft_wait_s for s in stats)
        return cls(
            alpha=_ratio(accepted, compared),
            tau=None if num_drafts == 0 else 1 + accepted / num_drafts,
            hit_rate=_ratio(sum(s.num_lookahead_hits for s in stats), num_drafts),
            mean_gamma=mean_gamma(stats),
            tokens_per_round=num_tokens / max(1, num_rounds),
            target_step_s=step_s / max(1, num_rounds),
            verify_s=verify_s / max(1, num_rounds),
            draft_wait_share=_ratio(wait_s, verify_s + wait_s),
            limit_tokens_per_s=_ratio(num_tokens, step_s),
            limit_share=_ratio(step_s, after_first_s) if step_s > 0 else None,
        )


def survival_by_position(samples: Iterable[Sample]) -> tuple[float, ...]:
    """[k]: share of rounds with at least k + 1 accepted draft tokens; empty without draft tokens.

    Counts the rounds that had a draft token at the position; the last rounds of an output have
    fewer.
    """
    stats = [sample.stats for sample in samples if sample.stats is not None]
    found = []
    for position in range(max((len(s.num_accepted_tokens_per_pos) for s in stats), default=0)):
        num_had = sum(sum(s.num_rounds_per_gamma[position + 1 :]) for s in stats)
        num_accepted = sum(
            sum(s.num_accepted_tokens_per_pos[position : position + 1]) for s in stats
        )
        found.append(num_accepted / num_had)
    return tuple(found)


def mean_gamma(stats: Sequence[SpeculationStats]) -> float:
    """Mean number of draft tokens per round, including rounds without any."""
    num_rounds = sum(sum(s.num_rounds_per_gamma) for s in stats)
    num_tokens = sum(g * num for s in stats for g, num in enumerate(s.num_rounds_per_gamma))
    return num_tokens / max(1, num_rounds)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
