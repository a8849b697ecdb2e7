"""A loaded model as a step calls it. Knows nothing of sequences or of how attention is computed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class BoundModel:
    """A transformers causal LM whose attention is ours, and what a step needs to know of it."""

    module: Any
    windows: tuple[int | None, ...]
    """Sliding window per layer by the configuration; None where a layer sees everything."""
    num_embeddings: int
    vocab_size: int
    max_context_len: int
    device: torch.device
    """Where token ids go in."""

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | int
    ) -> torch.Tensor:
        """Logits [rows, vocab] of packed tokens [1, T], in the model's dtype; rows 0: of all.

        Called within `attending`, in inference mode.
        """
        logits: torch.Tensor = self.module(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=rows,
        ).logits
        return logits[0]


def cache_argument(module: Any) -> str:
    """Name of the `forward` argument that takes a transformers KV cache.

    `cache` since transformers 5.24, `past_key_values` before.
    """
    has_new_name = "cache" in inspect.signature(module.forward).parameters
    return "cache" if has_new_name else "past_key_values"
