"""Distillation: trains the draft to predict the target's distribution.

Owns the training data (half corpus windows, half the target's own greedy and sampled continuations
of corpus prompts) and the loss.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from outrider_bench.quickstart.corpus import random_windows
from outrider_bench.quickstart.optimise import Limits, Optimiser, Progress, TrainingEvent, optimise
from outrider_bench.quickstart.rollout import continue_rows

# The draft runs along the target's own text. Users run greedy and temperature 1; 0.7 is between.
_TEMPERATURES = (0.0, 0.0, 0.7, 1.0, 1.0)
_LIMITS = Limits(num_steps=1500, time_budget_s=3600.0)


@dataclass(frozen=True)
class DistillConfig:
    """Amount of the target's continuations, and limits of the draft's training."""

    num_rollouts: int = 4096
    rollout_batch: int = 256
    num_prompt_tokens: int = 48
    num_new_tokens: int = 144
    rollout_budget_s: float = 900.0
    rows: int = 20
    num_window_tokens: int = 192
    limits: Limits = _LIMITS
    matrix_rate: float = 0.02
    other_rate: float = 5e-3


def write_rollouts(
    target: LlamaForCausalLM,
    stream: torch.Tensor,
    config: DistillConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The target's continuations of random prompts: int64 [rows, prompt + new tokens]."""
    started = time.monotonic()
    batches: list[torch.Tensor] = []
    num_batches = max(1, config.num_rollouts // config.rollout_batch)
    pattern = torch.tensor(_TEMPERATURES).repeat(config.rollout_batch)[: config.rollout_batch]
    for index in range(num_batches):
        elapsed_s = time.monotonic() - started
        if batches and elapsed_s >= config.rollout_budget_s:
            break
        if progress:
            progress(TrainingEvent("rollouts", index, num_batches, float("nan"), elapsed_s))
        prompts = random_windows(stream, config.rollout_batch, config.num_prompt_tokens, generator)
        with torch.autocast("cpu", torch.bfloat16):
            batches.append(
                continue_rows(
                    target,
                    prompts,
                    num_new_tokens=config.num_new_tokens,
                    temperatures=pattern,
                    generator=generator,
                )
            )
    return torch.cat(batches).clone()  # inference tensors cannot be indexed later


def distillation_loss(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, token_ids: torch.Tensor
) -> torch.Tensor:
    """Mean KL(target || draft) over all positions of `token_ids`: int64 [rows, tokens]."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target_logits = target(input_ids=token_ids, use_cache=False).logits
        draft_logits = draft(input_ids=token_ids, use_cache=False).logits
    return F.kl_div(
        draft_logits.float().flatten(0, 1).log_softmax(-1),
        target_logits.float().flatten(0, 1).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def distill(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    stream: torch.Tensor,
    rollouts: torch.Tensor,
    config: DistillConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> int:
    """Trains `draft` in place towards `target`. Returns the number of steps. Raises Interrupted."""
    draft.train()

    def loss_of_step(step: int) -> torch.Tensor:
        if step % 2:
            chosen = torch.randint(0, len(rollouts), (config.rows,), generator=generator)
            token_ids = rollouts[chosen]
        else:
            token_ids = random_windows(stream, config.rows, config.num_window_tokens, generator)
        return distillation_loss(target, draft, token_ids)

    optimiser = Optimiser(draft, matrix_rate=config.matrix_rate, other_rate=config.other_rate)
    return optimise("draft", optimiser, loss_of_step, config.limits, progress=progress)
