"""Checkpoint of a training: one file, replaced atomically, so a killed process can go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider.errors import ConfigError
from outrider_bench.distill.optimise import Optimiser, Position


class Checkpoint:
    """Weights, optimiser state and position of a training, in `path`.

    `generator`: random numbers of the training, restored with it.
    """

    def __init__(self, path: Path, generator: torch.Generator | None = None) -> None:
        self._path = path
        self._generator = generator

    @property
    def exists(self) -> bool:
        """Whether a training can go on from it."""
        return self._path.exists()

    def save(self, model: nn.Module, optimiser: Optimiser, position: Position) -> None:
        """Writes all of it, then renames: the file is complete or the earlier one."""
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "num_steps": position.num_steps,
            "elapsed_s": position.elapsed_s,
        }
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".partial")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def load(self, model: nn.Module, optimiser: Optimiser) -> Position:
        """Restores the training. Position 0 without a file. Raises ConfigError for another model's.

        The learning rates are not restored: those of the optimiser apply.
        """
        if not self.exists:
            return Position()
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{self._path}: not a checkpoint of this training: {reason}"
            ) from error
        if self._generator is not None:
            self._generator.set_state(state["generator"])
        return Position(state["num_steps"], state["elapsed_s"])

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self._path.unlink(missing_ok=True)
