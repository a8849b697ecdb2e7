"""Finds by bisection where a function of uniforms changes its result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_GRID = np.linspace(0.0, 1.0 - 2.0**-53, 6).tolist()
_NARROWEST = 2.0**-58


def cells(
    decide: Callable[[Sequence[float]], Any], num_uniforms: int
) -> list[tuple[float, list[float]]]:
    """Boxes of the unit cube on which `decide` is constant: their volume and a point of each.

    Each uniform is cut where the results change, given the cells of those before it.
    """
    boxes: list[tuple[float, list[float]]] = [(1.0, [])]
    for i in range(num_uniforms):
        num_left = num_uniforms - i - 1
        boxes = [
            (volume * (high - low), [*head, (low + high) / 2])
            for volume, head in boxes
            for low, high in _intervals(decide, head, num_left)
        ]
    return boxes


def _intervals(
    decide: Callable[[Sequence[float]], Any], head: list[float], num_left: int
) -> list[tuple[float, float]]:
    """Where [0, 1) must be cut, found at several settings of the later uniforms."""
    probes = _probes(num_left)

    def answer(value: float, probe: list[float]) -> Any:
        return decide([*head, value, *probe])

    def cuts(low: float, high: float, at_low: list[Any], at_high: list[Any]) -> list[float]:
        differing = [j for j in range(len(probes)) if at_low[j] != at_high[j]]
        if not differing:
            return []
        j = differing[0]
        a, b = low, high
        while b - a > _NARROWEST:
            middle = (a + b) / 2
            if not a < middle < b:
                break
            if answer(middle, probes[j]) == at_low[j]:
                a = middle
            else:
                b = middle
        at_a = [answer(a, probe) for probe in probes]
        at_b = [answer(b, probe) for probe in probes]
        return [*cuts(low, a, at_low, at_a), b, *cuts(b, high, at_b, at_high)]

    answers = [[answer(value, probe) for probe in probes] for value in _GRID]
    points = [0.0]
    for i in range(len(_GRID) - 1):
        points += cuts(_GRID[i], _GRID[i + 1], answers[i], answers[i + 1])
    points.append(1.0)
    return list(itertools.pairwise(points))


def _probes(num_left: int) -> list[list[float]]:
    if num_left == 0:
        return [[]]
    rng = np.random.default_rng(num_left)
    edges = [[0.0] * num_left, [1.0 - 2.0**-53] * num_left]
    return edges + rng.random((2, num_left)).tolist()
