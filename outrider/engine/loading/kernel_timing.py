"""Timing of linear kernels at load, on the weights of the model and this machine.

The score of a kernel is its mean time over passes of 1, 2, 4, 8 and 16 tokens: a draft's pass, a
verification, a few sequences together. A kernel replaces a preferred one only if it is clearly
faster, so that noise does not change the choice between two starts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from outrider.engine.loading.linear_kernels import LinearKernel, LinearWeights

ROW_COUNTS = (1, 2, 4, 8, 16)
"""Numbers of tokens that are timed, with equal weights."""

CACHE_BYTES = 64 << 20
"""More than a core's share of the last-level cache: a larger model's weights come from memory."""

MIN_WEIGHTS = 1 << 16
"""Layers with fewer weights are not timed: calls cost more than kernels there."""

_MAX_WEIGHTS = CACHE_BYTES // 4
_WARM_UP_OUTPUTS = 16
_NUM_ROUNDS = 3
_BUDGET_S = 0.2
_CLEARLY_FASTER = 0.9


def timed_part(weights: LinearWeights) -> LinearWeights:
    """The layer, or as many of its outputs as bound memory and time of the timing."""
    return weights.first_rows(max(1, _MAX_WEIGHTS // weights.weight.shape[1]))


@torch.inference_mode()
def ranked(
    layers: Sequence[LinearKernel], weights: LinearWeights, *, from_memory: bool
) -> list[tuple[str, float]]:
    """Names and mean times (seconds) of the kernels, best first.

    `layers`: the layer of `weights` on each kernel, in order of preference, already called once for
    every row count. `from_memory`: empty the cache before each turn, as the other layers of a model
    larger than the cache do; the kernel's code is then brought back by a call of a small layer.
    Takes `_BUDGET_S` of CPU time and at most one round more.
    """
    evicting = torch.zeros(CACHE_BYTES // 4 if from_memory else 0)
    few = weights.first_rows(_WARM_UP_OUTPUTS)
    pairs = [(type(layer)(few), layer) for layer in layers]
    width, dtype = layers[0].in_features, weights.weight.dtype
    inputs = [torch.linspace(-1.0, 1.0, n * width).to(dtype) for n in ROW_COUNTS]
    best: dict[tuple[int, str], float] = {}
    # Other processes may use the cores: CPU time leaves out waiting for one, but counts threads
    # that work side by side as if one after the other.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = time.thread_time()
    for _ in range(_NUM_ROUNDS):
        for rows, values in zip(ROW_COUNTS, inputs, strict=True):
            x = values.reshape(1, rows, -1)
            evicting.sum()
            for small, layer in pairs:
                small(x)
                start = clock()
                layer(x)
                took = clock() - start
                key = rows, layer.name
                best[key] = min(took, best.get(key, took))
        if time.thread_time() - began > _BUDGET_S:
            break
    mean = {
        layer.name: sum(best[rows, layer.name] for rows in ROW_COUNTS) / len(ROW_COUNTS)
        for layer in layers
    }
    return by_preference(mean)


def by_preference(mean: dict[str, float]) -> list[tuple[str, float]]:
    """Fastest first; a preferred kernel stays ahead of others that are not clearly faster."""
    order: list[tuple[str, float]] = []
    left = dict(mean)
    while left:
        fastest = min(left.values())
        name = next(n for n, mean_s in left.items() if mean_s * _CLEARLY_FASTER <= fastest)
        order.append((name, left.pop(name)))
    return order
