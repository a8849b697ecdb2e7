"""Reference for the engine: plain Hugging Face, one sequence at a time, no cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.tiny_models import LOGIT_STD

# Tolerance in standard deviations of the logits: float32 sums in another order.
TOLERANCE = 2e-5


class Reference:
    """Eager, uncached logits of whole sequences."""

    def __init__(self, directory: Path) -> None:
        auto: Any = transformers.AutoModelForCausalLM
        self._model = auto.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [len(token_ids), vocab]."""
        logits: torch.Tensor = self._model(torch.tensor([token_ids]), use_cache=False).logits
        return logits[0]


class Shadow:
    """Creates random tokens, and checks an engine's logits against a Reference."""

    def __init__(self, reference: Reference, seed: int, vocab_size: int = 256) -> None:
        self._reference = reference
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def random_tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._rng.integers(self._vocab_size, size=count).tolist()
        return tokens

    def assert_rows(self, rows: torch.Tensor, token_ids: list[int], what: str) -> None:
        """Assert that `rows` are the logits of the last tokens of `token_ids`."""
        if len(rows) == 0:
            return
        expected = self._reference.logits(token_ids)[-len(rows) :]
        difference = float((rows - expected).abs().max())
        assert difference <= TOLERANCE * LOGIT_STD, f"{what}: differs by {difference:.2g}"
