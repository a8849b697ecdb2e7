"""What a forward step is made of: each sequence's share of the packed rows.

Plain data, index arrays that are sent to a device once, and the seam behind which attention is
computed (packed.py, flashinfer_backend.py); knows nothing of how.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from outrider.engine.attention.interface import QueryBlock, Step
from outrider.engine.kv.store import Sequence

# Queries attended at once: a long prefill skips the keys after each block, and the explicit
# path's scores stay small. Decoding and verification never reach it.
_BLOCK_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's share of a step: packed rows [start, stop), after `past` cached tokens."""

    sequence: Sequence
    start: int
    stop: int
    past: int

    @property
    def total(self) -> int:
        """Tokens that the sequence has after the step."""
        return self.past + self.stop - self.start

    def blocks(self, window: int | None) -> list[QueryBlock]:
        return [
            QueryBlock.of(first, min(first + _BLOCK_TOKENS, self.total) - 1, window)
            for first in range(self.past, self.total, _BLOCK_TOKENS)
        ]


class Backend(Protocol):
    """One way to attend; an engine has one for as long as it lives."""

    def step(self, segments: Seq[Segment]) -> Step:
        """What carries the attention of one forward; the step before it is over."""
        ...


class OnDevices:
    """An array of indices, and its copy on each device that asked for one."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._copies: dict[torch.device, torch.Tensor] = {}

    def get(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = torch.from_numpy(self._array).to(device)
        return self._copies[device]
