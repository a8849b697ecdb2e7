"""A loaded model and its calling convention for packed steps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class BoundModel:
    """Causal LM of transformers that uses our attention, and what a step must know about it."""

    module: Any
    windows: tuple[int | None, ...]
    """Sliding window per layer, from the configuration; None: the layer attends to everything."""
    num_embeddings: int
    vocab_size: int
    max_context_len: int
    device: torch.device
    """Device of the input embeddings: token ids go there."""

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | int
    ) -> torch.Tensor:
        """Logits [rows, vocab] of packed tokens [1, T], in the model's dtype; rows 0: all rows.

        Call it within `attending`, in inference mode.
        """
        logits: torch.Tensor = self.module(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=rows,
        ).logits
        return logits[0]


def cache_argument(module: Any) -> str:
    """Name of the `forward` argument for a transformers KV cache.

    `cache` since transformers 5.24, `past_key_values` before.
    """
    has_new_name = "cache" in inspect.signature(module.forward).parameters
    return "cache" if has_new_name else "past_key_values"
