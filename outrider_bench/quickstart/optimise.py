"""Training loop of pre-training and distillation.

Owns optimisers, the learning-rate schedule, and step and wall-clock limits. The loss and the
checkpoint are functions of the caller.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

_WARMUP_STEPS = 40
_DECAY_FROM = 0.5  # share of the training with a constant rate; then linear to zero
_PROGRESS_EVERY = 25
_CHECKPOINT_EVERY_S = 240.0
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainingEvent:
    """One progress line. `loss`: mean since the last event, in nats per token."""

    stage: str
    step: int
    num_steps: int
    loss: float
    elapsed_s: float


Progress = Callable[[TrainingEvent], None]


@dataclass(frozen=True)
class Limits:
    """Limits of a training; the first reached ends it. Only the step limit is reproducible."""

    num_steps: int
    time_budget_s: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a stage between two steps. `num_steps`: number of steps taken."""

    def __init__(self, stage: str, num_steps: int) -> None:
        super().__init__(f"{stage}: {num_steps} steps")
        self.stage = stage
        self.num_steps = num_steps


class _CtrlC:
    """Records Ctrl-C during a block instead of raising KeyboardInterrupt; a second one raises.

    A KeyboardInterrupt raised inside a callback of torch is lost. No effect outside the main
    thread.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        self._previous: Any = None

    def __enter__(self) -> _CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, *_: object) -> None:
        if self.was_pressed:
            raise KeyboardInterrupt
        self.was_pressed = True


class Optimiser:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""

    def __init__(self, model: LlamaForCausalLM, *, matrix_rate: float, other_rate: float) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in matrix_ids]
        self._parameters = [*matrices, *others]
        self._rates = (matrix_rate, other_rate)
        self._optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, loss: torch.Tensor, scale: float) -> None:
        """Takes one step at `scale` times the learning rates."""
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRAD_NORM)
        for optimiser in self._optimisers:
            optimiser.step()


def rate_scale(step: int, done: float) -> float:
    """Factor of the learning rate at `step`. `done`: share of the training completed."""
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    return warm * min(1.0, max(0.0, (1.0 - done) / (1.0 - _DECAY_FROM)))


def optimise(
    stage: str,
    optimiser: Optimiser,
    loss_of_step: Callable[[int], torch.Tensor],
    limits: Limits,
    *,
    progress: Progress | None = None,
    checkpoint: Callable[[], None] | None = None,
) -> int:
    """Takes training steps until a limit. Returns their number. Raises Interrupted."""
    with _CtrlC() as ctrl_c:
        num_steps = _run_steps(stage, optimiser, loss_of_step, limits, progress, checkpoint, ctrl_c)
    if ctrl_c.was_pressed:
        raise Interrupted(stage, num_steps)
    return num_steps


def _run_steps(
    stage: str,
    optimiser: Optimiser,
    loss_of_step: Callable[[int], torch.Tensor],
    limits: Limits,
    progress: Progress | None,
    checkpoint: Callable[[], None] | None,
    ctrl_c: _CtrlC,
) -> int:
    started = saved = time.monotonic()
    losses: list[float] = []
    for step in range(limits.num_steps):
        now = time.monotonic()
        elapsed_s = now - started
        if elapsed_s >= limits.time_budget_s or ctrl_c.was_pressed:
            return step
        loss = loss_of_step(step)
        done = max(step / limits.num_steps, elapsed_s / limits.time_budget_s)
        optimiser.step(loss, rate_scale(step, done))
        losses.append(loss.item())
        if progress and (step % _PROGRESS_EVERY == 0 or step + 1 == limits.num_steps):
            mean = sum(losses) / len(losses)
            progress(TrainingEvent(stage, step, limits.num_steps, mean, elapsed_s))
            losses.clear()
        if checkpoint and now - saved >= _CHECKPOINT_EVERY_S:
            checkpoint()
            saved = now
    return limits.num_steps
