"""Truncated distribution of a draft token: the distribution sent is the one sampled from.

The draft keeps its most likely tokens up to a share of the mass, renormalises, samples, and sends
ids and probabilities. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The acceptance lost by truncation is at most the tail's mass.
MAX_SUPPORT_SIZE = 32
SUPPORT_MASS = 0.99


@dataclass(frozen=True)
class Support:
    """`token_ids` int64 [k], distinct; `probs` float64 [k], positive, summing to 1."""

    token_ids: npt.NDArray[np.int64]
    probs: npt.NDArray[np.float64]

    @classmethod
    def normalised(
        cls, token_ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]
    ) -> Support:
        """From float32 weights, as sent. Draft and orchestrator get the same probabilities."""
        probs = weights.astype(np.float64)
        return cls(token_ids, probs / probs.sum())

    def index_of(self, token_id: int) -> int:
        """Index of the token; -1 if it is outside the support."""
        where = np.flatnonzero(self.token_ids == token_id)
        return int(where[0]) if where.size else -1

    def sample(self, uniform: float) -> int:
        """Inverse-CDF sample for a `uniform` in [0, 1)."""
        index = int(np.searchsorted(np.cumsum(self.probs), uniform, side="right"))
        return int(self.token_ids[min(index, len(self.token_ids) - 1)])


def truncate(
    token_ids: npt.NDArray[np.int64],
    probs: npt.NDArray[np.float64],
    mass: float = SUPPORT_MASS,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The fewest most likely tokens that cover `mass`, with float32 weights.

    `token_ids` and `probs`: most likely first.
    """
    size = min(int(np.searchsorted(np.cumsum(probs), mass)) + 1, len(probs))
    head = probs[:size].astype(np.float32)
    size = max(int(np.count_nonzero(head)), 1)  # weights that underflow to zero are dropped
    return token_ids[:size], head[:size]
