"""Processes of a training: one, or those that `accelerate launch` started, one per device."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

Item = TypeVar("Item")

# The others wait while one process writes or measures: longer than torch's ten minutes.
_LONGEST_WAIT = timedelta(hours=6)


class Processes:
    """This process and its place among those of the training. Made once per process."""

    def __init__(self, device: str) -> None:
        """`device`: auto, cpu or cuda. With several processes each has a device of its own."""
        self._accelerator: Any = accelerate.Accelerator(
            cpu=device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        )
        self.device: torch.device = self._accelerator.device
        self.index: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports: exactly one does."""
        return bool(self._accelerator.is_main_process)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of the items."""
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self._accelerator.wait_for_everyone()

    def prepare(self, model: Any) -> Any:
        """The model whose gradients are averaged over all processes."""
        return self._accelerator.prepare_model(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Computes the gradients of a loss of a prepared model."""
        self._accelerator.backward(loss)

    def agree(self, value: float) -> float:
        """The main process's value, in all of them."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]

    def close(self) -> None:
        """Leaves the group of processes."""
        self._accelerator.end_training()
