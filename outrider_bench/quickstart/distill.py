"""Distillation: trains the draft to predict the target's distribution.

Owns the training data: half corpus windows, half the target's own greedy and sampled continuations
of corpus prompts. The training itself is that of `outrider distill`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from outrider_bench.distill.checkpoint import Checkpoint
from outrider_bench.distill.losses import forward_kl
from outrider_bench.distill.optimise import Limits, Optimiser, Progress, TrainingEvent
from outrider_bench.distill.rows import Batch
from outrider_bench.distill.train import train_draft
from outrider_bench.quickstart.corpus import random_windows
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


def distill(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    stream: torch.Tensor,
    rollouts: torch.Tensor,
    config: DistillConfig,
    checkpoint: Checkpoint,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> int:
    """Trains `draft` in place towards `target`, from the checkpoint on if there is one.

    Returns the number of steps of all runs together. Raises Interrupted.
    """

    def batch_of_step(step: int) -> Batch:
        if step % 2:
            chosen = torch.randint(0, len(rollouts), (config.rows,), generator=generator)
            return Batch(rollouts[chosen])
        return Batch(random_windows(stream, config.rows, config.num_window_tokens, generator))

    return train_draft(
        target,
        draft,
        batch_of_step,
        loss=forward_kl,
        optimiser=Optimiser(draft, matrix_rate=config.matrix_rate, other_rate=config.other_rate),
        limits=config.limits,
        checkpoint=checkpoint,
        progress=progress,
    ).num_steps
