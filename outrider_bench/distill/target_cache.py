"""Cache of the target's distributions along the rows: computed once, used in every epoch.

A position takes 384 bytes: 64 token ids and log-probabilities (`distributions`). Recorded traffic
has its most likely tokens already; nothing is computed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from outrider_bench.distill.distributions import PartialDistributions, partial_distributions
from outrider_bench.distill.rows import Batch, Row
from outrider_bench.distill.train import fast_precision

_ROWS_AT_ONCE = 16


class TargetCache:
    """Distributions of the target along `rows`, on the CPU: at most `max_bytes` of them.

    Those that do not fit are computed at each use. `vocab_size`: token ids that both models have.
    """

    def __init__(
        self, target: Any, rows: Sequence[Row], *, vocab_size: int, max_bytes: int, seed: int = 0
    ) -> None:
        self._target = target
        self._rows = rows
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._device = next(iter(target.parameters())).device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._kept: dict[int, PartialDistributions] = {}
        self.num_bytes = 0

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows with their distributions, which are computed if they are not kept."""
        parts = {i: part for i in indices if (part := self._known(i)) is not None}
        missing = [i for i in indices if i not in parts]
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            computed = missing[start : start + _ROWS_AT_ONCE]
            for index, part in zip(computed, self._compute(computed), strict=True):
                parts[index] = part
                if self.num_bytes + part.num_bytes <= self._max_bytes:
                    self._kept[index] = part
                    self.num_bytes += part.num_bytes
        batch = Batch.of([self._rows[i] for i in indices], self._device)
        joined = PartialDistributions.joined([parts[i] for i in indices])
        return replace(batch, target=joined.within(self._vocab_size, self._device))

    def _known(self, index: int) -> PartialDistributions | None:
        recorded = self._rows[index].top
        return self._kept.get(index) if recorded is None else recorded

    @torch.inference_mode()
    def _compute(self, indices: Sequence[int]) -> list[PartialDistributions]:
        rows = [self._rows[i] for i in indices]
        batch = Batch.of(rows, self._device)
        with fast_precision(self._device):
            logits = batch.logits(self._target)
        found = partial_distributions(logits[:, : self._vocab_size], self._generator)
        return found.split([row.num_output_tokens for row in rows])
