"""KV tensors: in every layer, one row of keys and one of values per token that fits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


# Rows to copy: first source row, first target row, number of rows.
CopyRun = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """Shape, dtype and device of what one layer stores per token."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def empty(self, num_layers: int, rows: int, dim: int) -> torch.Tensor:
        import torch  # local: a simulated engine has no layers and needs no torch

        shape = (num_layers, rows, self.num_heads, dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class KVRows:
    """K and V per layer, each as [rows, num_heads, dim].

    Layers with the same layout share one block of memory, so a row is copied for all of them at
    once.
    """

    def __init__(
        self,
        layers: Seq[LayerLayout],
        num_rows: int,
        on_copy: Callable[[Seq[CopyRun]], None] | None = None,
    ) -> None:
        """`on_copy` is called before rows are copied."""
        self._on_copy = on_copy
        keys: dict[int, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        self._blocks: list[torch.Tensor] = []
        for layout in dict.fromkeys(layers):
            alike = [i for i, layer in enumerate(layers) if layer == layout]
            # The operating system commits memory of torch.empty page by page at the first write.
            block_k = layout.empty(len(alike), num_rows, layout.key_dim)
            block_v = layout.empty(len(alike), num_rows, layout.value_dim)
            self._blocks += [block_k, block_v]
            for index, layer in enumerate(alike):
                keys[layer], values[layer] = block_k[index], block_v[index]
        self.keys = [keys[layer] for layer in range(len(layers))]
        self.values = [values[layer] for layer in range(len(layers))]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy rows [source, source + count) to [target, target + count); they must not overlap."""
        self.copy_runs([(source, target, count)])

    def copy_scattered(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy row source[i] to row target[i]; runs consecutive on both sides in one copy."""
        jumps = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
        runs = [run for run in np.split(np.arange(source.size), jumps) if run.size]
        self.copy_runs([(int(source[run[0]]), int(target[run[0]]), run.size) for run in runs])

    def copy_runs(self, runs: Seq[CopyRun]) -> None:
        """Copy runs of rows, in order."""
        if self._on_copy is not None and runs:
            self._on_copy(runs)
        for source, target, count in runs:
            for block in self._blocks:
                block[:, target : target + count] = block[:, source : source + count]
