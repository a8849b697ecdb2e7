"""Training loop: Muon and AdamW, learning rate schedule, limits, progress, Ctrl-C, resume.

Training of the quickstart target and of every draft uses `optimise`. The loss of a step, the data
and what a checkpoint contains are functions of the caller.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Number of steps of a training that only its time limit ends.
ENDLESS = 10**9

_WARMUP_STEPS = 40
_DECAY_FROM = 0.5  # share of the training with a constant rate; then linear to zero
_PROGRESS_EVERY = 25
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


@dataclass(frozen=True)
class Position:
    """How far a training is, all its runs together."""

    num_steps: int = 0
    elapsed_s: float = 0.0

    def done(self, limits: Limits) -> float:
        """Share of the training completed; at 1 or above a limit is reached."""
        by_steps = self.num_steps / limits.num_steps if limits.num_steps else 1.0
        by_time = self.elapsed_s / limits.time_budget_s if limits.time_budget_s else 1.0
        return max(by_steps, by_time)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a stage between two steps. `num_steps`: number of steps taken."""

    def __init__(self, stage: str, num_steps: int) -> None:
        super().__init__(f"{stage}: {num_steps} steps")
        self.stage = stage
        self.num_steps = num_steps


class CtrlC:
    """Records Ctrl-C during a block instead of raising KeyboardInterrupt; a second one raises.

    A KeyboardInterrupt raised inside a callback of torch is lost. No effect outside the main
    thread.
    """

    def __init__(self) -> None:
        self.was_pressed = False
        self._previous: Any = None

    def __enter__(self) -> CtrlC:
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
    """Muon for the layers' matrices, AdamW for embeddings and norms.

    With `matrix_rate` None, AdamW for everything. `backward` computes the gradients of a loss: that
    of accelerate also sums them over the processes of a training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_rate: float | None,
        other_rate: float,
        backward: Callable[[torch.Tensor], None] = torch.autograd.backward,
    ) -> None:
        matrices = [] if matrix_rate is None else list(_layer_matrices(model))
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in matrix_ids]
        self._backward = backward
        self._parameters = [*matrices, *others]
        adamw = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimisers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, other_rate)]
        if matrix_rate is not None:
            muon = torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.01)
            self._optimisers.insert(0, (muon, matrix_rate))

    def step(self, loss: torch.Tensor, scale: float) -> None:
        """Takes one step at `scale` times the learning rates."""
        for optimiser, rate in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        self._backward(loss)
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRAD_NORM)
        for optimiser, _ in self._optimisers:
            optimiser.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimisers, for a checkpoint."""
        return [optimiser.state_dict() for optimiser, _ in self._optimisers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores the state of an optimiser of the same model and kind."""
        for (optimiser, _), state in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(state)


def _layer_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Matrices of the layers: without embeddings and the head, which Muon is not made for."""
    embeddings: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    for name, parameter in model.named_parameters():
        is_head = name.startswith(("lm_head.", "module.lm_head.", "embed_out."))
        if parameter.ndim == 2 and id(parameter) not in embeddings and not is_head:
            yield parameter


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
    start: Position | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[Position], None] | None = None,
    checkpoint_s: float = 240.0,
    agree: Callable[[float], float] = lambda done: done,
) -> Position:
    """Takes training steps from `start` until a limit. Returns the position. Raises Interrupted.

    `checkpoint` is called every `checkpoint_s` seconds, and at Ctrl-C. `agree` gives all processes
    of a training the same share completed: they take the same number of steps at the same rates.
    """
    loop = _Loop(stage, limits, start or Position(), progress, checkpoint, checkpoint_s, agree)
    with CtrlC() as ctrl_c:
        position = loop.run(optimiser, loss_of_step, ctrl_c)
    if ctrl_c.was_pressed:
        if checkpoint:
            checkpoint(position)
        raise Interrupted(stage, position.num_steps)
    return position


@dataclass(frozen=True)
class _Loop:
    stage: str
    limits: Limits
    start: Position
    progress: Progress | None
    checkpoint: Callable[[Position], None] | None
    checkpoint_s: float
    agree: Callable[[float], float]

    def run(
        self, optimiser: Optimiser, loss_of_step: Callable[[int], torch.Tensor], ctrl_c: CtrlC
    ) -> Position:
        position = self.start
        began = saved = time.monotonic()
        losses: list[float] = []
        while True:
            now = time.monotonic()
            position = Position(position.num_steps, self.start.elapsed_s + now - began)
            done = self.agree(1.0 if ctrl_c.was_pressed else position.done(self.limits))
            if done >= 1.0:
                return position
            step = position.num_steps
            loss = loss_of_step(step)
            optimiser.step(loss, rate_scale(step, done))
            losses.append(loss.item())
            self._show(position, losses)
            position = Position(step + 1, position.elapsed_s)
            if self.checkpoint and now - saved >= self.checkpoint_s:
                self.checkpoint(position)
                saved = now

    def _show(self, position: Position, losses: list[float]) -> None:
        step, num_steps = position.num_steps, self.limits.num_steps
        if self.progress and (step % _PROGRESS_EVERY == 0 or step + 1 == num_steps):
            mean = sum(losses) / len(losses)
            self.progress(TrainingEvent(self.stage, step, num_steps, mean, position.elapsed_s))
            losses.clear()
