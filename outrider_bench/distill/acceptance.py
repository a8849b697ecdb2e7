"""Acceptance rate of a draft on rows of its target's text, and whether a draft got worse.

Teacher-forced: each distribution is compared given the target's own context. It is what
verification accepts of the first draft token of a round, without supports and logits processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from outrider_bench.distill import losses
from outrider_bench.distill.rows import Batch, Row
from outrider_bench.distill.train import common_log_probs

_ROWS_AT_ONCE = 8
# A fall within this many standard errors of the rows' differences is noise.
_NOISE_DEVIATIONS = 2.0


@dataclass(frozen=True)
class Acceptance:
    """Acceptance rates: means over positions, and over each row.

    `sampled`: Σ min(target_probs, draft_probs) at temperature 1 (Leviathan et al. 2023, Corollary
    3.6), along sampled text. `greedy`: share of equal argmaxes, along greedy text. If all rows have
    the same kind of text, both rates are measured along it.
    """

    sampled: float
    greedy: float
    num_positions: int
    sampled_by_row: tuple[float, ...]
    greedy_by_row: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Acceptance:
        """The inverse of `to_dict`."""
        by_row = {name: tuple(values[name]) for name in ("sampled_by_row", "greedy_by_row")}
        return cls(**{**values, **by_row})

    def summary(self) -> dict[str, float]:
        """The rates, without the rows."""
        return {"sampled": self.sampled, "greedy": self.greedy}


@torch.inference_mode()
def measure_acceptance(target: Any, draft: Any, rows: Sequence[Row]) -> Acceptance:
    """Measures a draft in the dtype it is loaded in. `rows`: not empty, from `held_out`."""
    device = next(iter(draft.parameters())).device
    sampled: list[tuple[float, int]] = []
    greedy: list[tuple[float, int]] = []
    num_positions = 0
    kinds = {row.temperature > 0 for row in rows}
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chosen = rows[start : start + _ROWS_AT_ONCE]
        batch = Batch.of(chosen, device)
        log_probs = common_log_probs(batch.logits(target), batch.logits(draft))
        accepted = losses.acceptance(*log_probs)
        equal = (log_probs[0].argmax(-1) == log_probs[1].argmax(-1)).float()
        lengths = [row.num_output_tokens for row in chosen]
        num_positions += sum(lengths)
        parts = zip(
            chosen, torch.split(accepted, lengths), torch.split(equal, lengths), strict=True
        )
        for row, of_sampling, of_greedy in parts:
            if row.temperature > 0 or len(kinds) == 1:
                sampled.append((of_sampling.sum().item(), len(of_sampling)))
            if row.temperature == 0 or len(kinds) == 1:
                greedy.append((of_greedy.sum().item(), len(of_greedy)))
    return Acceptance(
        _mean(sampled), _mean(greedy), num_positions, _by_row(sampled), _by_row(greedy)
    )


def _mean(sums: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _by_row(sums: list[tuple[float, int]]) -> tuple[float, ...]:
    return tuple(total / count for total, count in sums)


def worse(before: Acceptance, after: Acceptance) -> str | None:
    """Why the later draft is worse than the earlier one on the same rows; None if it is not.

    It is worse if no rate rose and one fell, or if one fell by more than two standard errors.
    """
    falls: list[str] = []
    pairs = {
        "at T = 1": (before.sampled, after.sampled, before.sampled_by_row, after.sampled_by_row),
        "greedy": (before.greedy, after.greedy, before.greedy_by_row, after.greedy_by_row),
    }
    significant = False
    rose = False
    for name, (was, is_now, rows_before, rows_after) in pairs.items():
        rose |= is_now > was
        if is_now < was:
            falls.append(f"α {name} fell from {was:.4f} to {is_now:.4f}")
            significant |= was - is_now > _NOISE_DEVIATIONS * _error(rows_before, rows_after)
    return " and ".join(falls) if falls and (significant or not rose) else None


def _error(rows_before: Sequence[float], rows_after: Sequence[float]) -> float:
    """Standard error of the mean difference of paired rows; 0 for a single row."""
    changes = [after - before for before, after in zip(rows_before, rows_after, strict=True)]
    if len(changes) < 2:
        return 0.0
    mean = sum(changes) / len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    return math.sqrt(variance / len(changes))
