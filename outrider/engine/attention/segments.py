"""Segments of a forward step, the Backend protocol, and index arrays on devices.

A segment is one sequence's share of the packed rows. Backends that compute attention over segments:
`torch_backend.py` and `flashinfer_backend.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from outrider.engine.attention.interface import QueryBlock, Step
from outrider.engine.kv.store import Sequence

# Queries per attention call. In a long prefill each block skips the keys after it, and the scores
# of the explicit path stay small. Decoding and verification have fewer tokens.
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
        """Length of the sequence after the step."""
        return self.past + self.stop - self.start

    def blocks(self, window: int | None) -> list[QueryBlock]:
        """The new tokens in blocks of at most 128 queries."""
        return [
            QueryBlock.of(first, min(first + _BLOCK_TOKENS, self.total) - 1, window)
            for first in range(self.past, self.total, _BLOCK_TOKENS)
        ]


class Backend(Protocol):
    """Attention implementation of an engine, for its lifetime."""

    def step(self, segments: Seq[Segment]) -> Step:
        """The attention of one forward pass. The previous pass must have finished."""
        ...


class OnDevices:
    """Index array with a cached copy on each device that uses it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._copies: dict[torch.device, torch.Tensor] = {}

    def get(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = torch.from_numpy(self._array).to(device)
        return self._copies[device]
