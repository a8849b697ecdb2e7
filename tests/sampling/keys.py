"""Keys of many uniforms at once: an independent, vectorised SplitMix64 on unsigned integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outrider.sampling.random import Purpose

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 17)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def stream_keys(
    seeds: npt.ArrayLike,
    purpose: Purpose,
    positions: npt.ArrayLike,
    base_lens: npt.ArrayLike = 0,
) -> npt.NDArray[np.int64]:
    """`stream_key` for arrays of seeds, positions and base lengths, which are broadcast."""
    one = np.uint64(1)
    parts = [np.asarray(part, np.uint64) for part in (int(purpose), positions, base_lens)]
    keys = np.asarray(seeds, np.uint64)
    for part in parts:
        keys = mix(np.atleast_1d(keys + _GOLDEN * np.atleast_1d(part + one)))
    return keys.view(np.int64)
