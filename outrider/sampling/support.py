"""A draft token's distribution on a small support: what is sampled from is exactly what is sent.

The draft keeps its likeliest tokens up to a share of the mass, renormalises, draws, and sends the
ids and probabilities. Pure numpy; knows neither models nor the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# The tail a draft gives up costs at most as much acceptance as it has mass.
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
        """From float32 weights, as sent: both ends divide by the same sum, so both have one law."""
        probs = weights.astype(np.float64)
        return cls(token_ids, probs / probs.sum())

    def index_of(self, token_id: int) -> int:
        """Where the token stands; -1 if outside."""
        where = np.flatnonzero(self.token_ids == token_id)
        return int(where[0]) if where.size else -1

    def sample(self, uniform: float) -> int:
        """The token at `uniform` in [0, 1) of the cumulative distribution."""
        index = int(np.searchsorted(np.cumsum(self.probs), uniform, side="right"))
        return int(self.token_ids[min(index, len(self.token_ids) - 1)])


def truncate(
    token_ids: npt.NDArray[np.int64],
    probs: npt.NDArray[np.float64],
    mass: float = SUPPORT_MASS,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The shortest head of tokens, given likeliest first, that covers `mass`; weights float32."""
    size = min(int(np.searchsorted(np.cumsum(probs), mass)) + 1, len(probs))
    head = probs[:size].astype(np.float32)
    size = max(int(np.count_nonzero(head)), 1)  # underflow to zero: not in the support
    return token_ids[:size], head[:size]
