"""Arrival times: a renewal process with gamma-distributed gaps. Pure."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError


def arrival_times(
    rate: float, num: int, generator: np.random.Generator, *, burstiness: float = 1.0
) -> npt.NDArray[np.float64]:
    """Send times in seconds from the start, float64 [num], increasing; the last is at num / `rate`.

    `burstiness`: shape of the gamma-distributed gaps, as in `vllm bench serve`. 1 is a Poisson
    process; smaller is burstier, larger is steadier, infinity gives constant gaps. Gaps are scaled
    so that num requests arrive in num / `rate` seconds: a Poisson process conditioned on that.

    Raises ConfigError unless both are positive.
    """
    if not rate > 0 or math.isinf(rate):
        raise ConfigError(f"--rate: {rate:g}; requests per second must be positive and finite")
    if not burstiness > 0:
        raise ConfigError(f"--burstiness: {burstiness:g}; must be positive; 1 is a Poisson process")
    if num == 0:
        return np.zeros(0)
    if math.isinf(burstiness):
        return np.arange(1, num + 1) / rate
    times = np.cumsum(generator.gamma(burstiness, size=num))
    return np.asarray(times * (num / rate / times[-1]), dtype=np.float64)
