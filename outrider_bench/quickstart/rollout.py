"""Plain generation with a small model, for distillation and evaluation.

Not the engine: Hugging Face's cache, prompts of equal length, no stopping.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from outrider.engine.loading.loaded_model import cache_argument


@torch.inference_mode()
def continue_rows(
    model: LlamaForCausalLM,
    prompts: torch.Tensor,
    *,
    num_new_tokens: int,
    temperatures: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Continues each row at its own temperature (0: greedy).

    `prompts` int64 [rows, num_prompt_tokens], `temperatures` float32 [rows]. Returns int64 [rows,
    num_prompt_tokens + num_new_tokens].
    """
    cache: Any = {cache_argument(model): DynamicCache(config=model.config)}
    rows = [prompts]
    step_ids = prompts
    for _ in range(num_new_tokens):
        out = model(input_ids=step_ids, use_cache=True, logits_to_keep=1, **cache)
        logits = out.logits[:, -1].float()
        # argmax(logits + T * Gumbel noise) samples softmax(logits / T) and is greedy at T = 0.
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        step_ids = (logits + temperatures[:, None] * noise).argmax(-1, keepdim=True)
        rows.append(step_ids)
    return torch.cat(rows, dim=1)
