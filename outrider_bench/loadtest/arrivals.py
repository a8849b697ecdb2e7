"""When requests are meant to be sent: a renewal process with gamma-distributed gaps. Pure.

Knows nothing of what is sent, nor of whether it was.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError


def arrival_times(
    rate: float, num: int, generator: np.random.Generator, *, burstiness: float = 1.0
) -> npt.NDArray[np.float64]:
    """Seconds from the begin, float64 [num], rising; the last is at num / `rate`.

    `burstiness` is the shape of the gamma-distributed gaps, as in `vllm bench serve`: 1 is a
    Poisson process; less comes in bursts, more is steadier, infinity is a clock. Gaps are scaled so
    that num come in num / `rate` seconds: a Poisson process of which that is known.

    Raises ConfigError for what is not above 0.
    """
    if not rate > 0 or math.isinf(rate):
        raise ConfigError(f"--rate: {rate:g}: requests per second, above 0")
    if not burstiness > 0:
        raise ConfigError(f"--burstiness: {burstiness:g}: above 0; 1 is a Poisson process")
    if num == 0:
        return np.zeros(0)
    if math.isinf(burstiness):
        return np.arange(1, num + 1) / rate
    times = np.cumsum(generator.gamma(burstiness, size=num))
    return np.asarray(times * (num / rate / times[-1]), dtype=np.float64)
