"""Choice of the kernel of each linear layer on CPU, at load.

The kernels are in `linear_kernels.py`. Of those that compute a layer exactly and work on this CPU,
the fastest by `kernel_timing.py` is used; torch's own kernel is the fallback.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from outrider.engine.loading.kernel_timing import (
    CACHE_BYTES,
    MIN_WEIGHTS,
    ROW_COUNTS,
    ranked,
    timed_part,
)
from outrider.engine.loading.linear_kernels import (
    CANDIDATES,
    FbgemmFloat16,
    LinearKernel,
    LinearWeights,
    TorchLinear,
    built,
    half_exponent,
)
from outrider.engine.loading.quantized import is_plain

_log = logging.getLogger(__name__)

_FAILURES = (RuntimeError, AttributeError, NotImplementedError)


def choose_kernels(model: nn.Module, forbidden: Collection[str] = ()) -> dict[str, int]:
    """Replace the linear layers of `model` in place; return the number of layers by kernel.

    A layer keeps torch's kernel on other devices than the CPU and where no other is faster. Kernels
    in `forbidden` are not used. A kernel that fails on this CPU is logged, and not tried again.
    Subclasses of nn.Linear (quantised, adapted) are neither changed nor counted. The weights of
    replaced layers are freed, one layer after another.
    """
    num_layers: Counter[str] = Counter()
    # Names, not modules or weights: references would keep the weights.
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    choice = _Choice(forbidden, _num_bytes(model, names))
    for name in names:
        layer = choice.layer(name, model.get_submodule(name))
        if layer is not None:
            model.set_submodule(name, layer)
        num_layers[TorchLinear.name if layer is None else layer.name] += 1
    choice.log_inexact(len(names))
    if num_layers.total() > num_layers[TorchLinear.name]:
        # The other parameters are views of the mapped checkpoint file and would keep it in memory.
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:
                parameter.data = parameter.data.clone()
    return dict(num_layers)


class _Choice:
    """Choice for the layers of one model: failed kernels and timings so far."""

    def __init__(self, forbidden: Collection[str], num_bytes: int) -> None:
        self._unusable = set(forbidden)
        self._orders: dict[tuple[Any, ...], list[type[LinearKernel]]] = {}
        self._from_memory = num_bytes > CACHE_BYTES
        self._inexact: list[str] = []

    def layer(self, name: str, module: nn.Module) -> LinearKernel | None:
        """The layer on its best kernel; None: torch's own."""
        weights = self._weights(name, module)
        for kernel in self._order(name, weights):
            if kernel is TorchLinear:
                break
            if kernel.name in self._unusable:
                continue
            try:
                return built(kernel, weights)
            except _FAILURES as error:
                self._refuse(kernel, name, error)
        return None

    def log_inexact(self, num_layers: int) -> None:
        """Log how many layers float16 does not hold exactly."""
        if self._inexact:
            _log.info("float16 does not hold the weights of %d of %d linear layers exactly, for "
                      "example %s: they stay in float32", len(self._inexact), num_layers,
                      self._inexact[0])  # fmt: skip

    def _weights(self, name: str, module: nn.Module) -> LinearWeights:
        weights = LinearWeights(_weight(module), getattr(module, "bias", None))
        if (
            weights.weight.dtype != torch.float32
            or weights.weight.device.type != "cpu"
            or FbgemmFloat16.name in self._unusable
        ):
            return weights
        exponent = half_exponent(weights.weight)
        if exponent is None:
            self._inexact.append(name)
        return LinearWeights(weights.weight, weights.bias, exponent)

    def _order(self, name: str, weights: LinearWeights) -> list[type[LinearKernel]]:
        """Kernels of a layer, best first: timed once for each shape and set of candidates."""
        if weights.weight.device.type != "cpu":
            return []
        candidates = [
            kernel
            for kernel in CANDIDATES
            if kernel.name not in self._unusable and kernel.suits(weights)
        ]
        if len(candidates) == 1 or weights.weight.numel() < MIN_WEIGHTS:
            return candidates
        key = (weights.weight.shape, weights.bias is None, *candidates)
        if key not in self._orders:
            self._orders[key] = self._timed(name, weights, candidates)
        return self._orders[key]

    def _timed(
        self, name: str, weights: LinearWeights, candidates: list[type[LinearKernel]]
    ) -> list[type[LinearKernel]]:
        part = timed_part(weights)
        layers = []
        for kernel in candidates:
            try:
                layers.append(built(kernel, part, ROW_COUNTS))
            except _FAILURES as error:
                self._refuse(kernel, name, error)
        times = ranked(layers, part, from_memory=self._from_memory)
        shown = ", ".join(f"{kernel} {mean_s * 1e3:.3g}" for kernel, mean_s in times)
        _log.info("kernels for %d x %d, ms for a mean pass of 1 to 16 tokens: %s",
                  *weights.weight.shape, shown)  # fmt: skip
        by_name = {kernel.name: kernel for kernel in candidates}
        return [by_name[kernel] for kernel, _ in times]

    def _refuse(self, kernel: type[LinearKernel], name: str, error: Exception) -> None:
        _log.warning("%s does not work on this CPU (layer %s): %s", kernel.name, name, error)
        self._unusable.add(kernel.name)


def _is_linear(module: nn.Module) -> bool:
    """Whether the module is exactly a linear layer, not quantised; Conv1D is GPT-2's."""
    kind: Any = type(module)
    return kind in (nn.Linear, Conv1D) and is_plain(module)


def _weight(module: Any) -> torch.Tensor:
    """Weight as [out_features, in_features]. Conv1D stores [in, out]."""
    weight: torch.Tensor = module.weight.detach()
    return weight if type(module) is nn.Linear else weight.t()


def _num_bytes(model: nn.Module, names: list[str]) -> int:
    weights = (_weight(model.get_submodule(name)) for name in names)
    return sum(weight.numel() * weight.element_size() for weight in weights)
