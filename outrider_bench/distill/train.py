"""Training of a draft towards its target: the loss of a batch, and the loop with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from outrider_bench.distill.checkpoint import Checkpoint
from outrider_bench.distill.losses import Loss
from outrider_bench.distill.optimise import Limits, Optimiser, Position, Progress, optimise
from outrider_bench.distill.rows import Batch

if TYPE_CHECKING:
    from outrider_bench.distill.processes import Processes


def fast_precision(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16; on CPUs only on those that compute in it."""
    # The name has an underscore; the public `get_capabilities` is newer than our oldest torch.
    has_bfloat16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16)


def distillation_loss(target: Any, draft: Any, batch: Batch, loss: Loss) -> Tensor:
    """Mean loss over the positions of a batch. Gradients for the draft only.

    The target's distributions are computed if the batch does not have them. Vocabularies may be
    padded to different widths: tokens that only one model has are left out.
    """
    with fast_precision(batch.token_ids.device):
        if batch.target is None:
            with torch.no_grad():
                target_logits = batch.logits(target)
        draft_logits = batch.logits(draft)
    if batch.target is not None:
        return loss(*batch.target.compared(draft_logits)).mean()
    return loss(*common_log_probs(target_logits, draft_logits)).mean()


def common_log_probs(target_logits: Tensor, draft_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities float32 [..., vocab] of both, over the tokens that both models have."""
    width = min(target_logits.shape[-1], draft_logits.shape[-1])
    return (
        target_logits[..., :width].float().log_softmax(-1),
        draft_logits[..., :width].float().log_softmax(-1),
    )


def train_draft(
    target: Any,
    draft: Any,
    batch_of_step: Callable[[int], Batch],
    *,
    loss: Loss,
    optimiser: Optimiser,
    limits: Limits,
    checkpoint: Checkpoint,
    checkpoint_s: float = 240.0,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Position:
    """Trains `draft` in place, from the checkpoint on if there is one. Raises Interrupted.

    `processes`: those that train together, each on batches of its own; None: this one alone.
    """
    start = checkpoint.load(draft, optimiser)
    draft.train()
    learner = processes.prepare(draft) if processes else draft
    saves = processes is None or processes.is_main
    position = optimise(
        "draft",
        optimiser,
        lambda step: distillation_loss(target, learner, batch_of_step(step), loss),
        limits,
        start=start,
        progress=progress,
        checkpoint=(lambda at: checkpoint.save(draft, optimiser, at)) if saves else None,
        checkpoint_s=checkpoint_s,
        agree=processes.agree if processes else lambda done: done,
    )
    if saves:
        checkpoint.save(draft, optimiser, position)
    draft.train(False)
    return position
