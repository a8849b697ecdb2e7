"""Sequential tests whose false-alarm probability holds at any time. Pure numpy.

A test bets against its hypothesis. It multiplies, over the trials, the likelihood ratio of each
alternative to the hypothesis; the mean of these products over the alternatives is the *evidence*.
If the hypothesis is true, each product is a nonnegative martingale that starts at 1, and so is
their mean. By Ville's inequality (Ville 1939) the probability that it ever reaches 1/a is at most
a, however often it is looked at (Robbins 1970; Ramdas et al. 2023, arXiv 2210.01948, section 3).

Trials of several generations may be interleaved. A trial's hypothesis must be known before its
outcome, and must hold given all earlier trials.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Log-likelihood ratio of an outcome that the hypothesis excludes; finite, to keep sums defined.
IMPOSSIBLE = 700.0

# Relative errors of acceptance probabilities that `acceptance_ratios` looks for.
_SCALES = np.array([-0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3])
# Share of the hypothesis in each alternative: an alternative then never excludes an outcome.
_SHARE = 0.1
# Log-likelihood ratios of an acceptance that was certain.
_IF_CERTAIN: Floats = np.log1p((1 - _SHARE) * np.minimum(_SCALES, 0.0))
# Changes of the log-odds that `tilt_ratios` looks for.
_TILTS = np.array([-1.0, -0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3, 1.0])
# Densities 1 + amplitude * cos(frequency * pi * u) that `position_ratios` looks for.
_AMPLITUDES = np.array([-0.5, -0.2, -0.05, -0.02, -0.01, 0.01, 0.02, 0.05, 0.2, 0.5])
_FREQUENCIES = np.array([1, 2, 3])


class Evidence:
    """Evidence of one test: the mean over alternatives of their products of likelihood ratios.

    `log_evidence` is its natural logarithm, `max_log_evidence` the greatest value so far.
    """

    def __init__(self) -> None:
        self._sums: Floats | None = None
        self.log_evidence = self.max_log_evidence = 0.0

    def add(self, log_ratios: Floats) -> None:
        """Adds one trial: log-likelihood ratios float64 [alternatives]."""
        self._sums = log_ratios if self._sums is None else self._sums + log_ratios
        self.log_evidence = float(np.logaddexp.reduce(self._sums)) - math.log(len(self._sums))
        self.max_log_evidence = max(self.max_log_evidence, self.log_evidence)


def acceptance_ratios(accepted: bool, prob: float) -> Floats:
    """A draft token was accepted with probability `prob`. Alternatives: `prob` is scaled."""
    if prob >= 1.0:
        if not accepted:
            return np.full(len(_SCALES), IMPOSSIBLE)
        return _IF_CERTAIN
    if prob <= 0.0:
        return np.full(len(_SCALES), IMPOSSIBLE if accepted else 0.0)
    scaled = (1 - _SHARE) * np.minimum(1.0, prob * (1 + _SCALES)) + _SHARE * prob
    ratios: Floats = scaled / prob if accepted else (1 - scaled) / (1 - prob)
    return np.log(ratios)


def acceptance_information(prob: float, bias: float) -> float:
    """Mean log-likelihood ratio per trial if `prob` is really scaled by 1 / (1 - `bias`).

    The Kullback-Leibler divergence. A test needs about (log(1/a) + log(number of alternatives))
    divided by its mean many trials (Wald 1945).
    """
    biased = min(1.0, prob / (1 - bias))
    if not 0.0 < prob < 1.0:
        return 0.0
    if biased == 1.0:
        return -math.log(prob)
    return biased * math.log(biased / prob) + (1 - biased) * math.log((1 - biased) / (1 - prob))


NUM_ACCEPTANCE_ALTERNATIVES = len(_SCALES)


def tilt_ratios(happened: bool, prob: float) -> Floats:
    """An event had probability `prob`. Alternatives: its log-odds are shifted."""
    ratios: Floats = _TILTS * happened - np.log1p(prob * np.expm1(_TILTS))
    return ratios


def position_ratios(position: float) -> Floats:
    """A position is uniform on [0, 1]. Alternatives: its density has slow waves."""
    waves = np.cos(np.pi * _FREQUENCIES * position)
    return np.log1p(np.outer(_AMPLITUDES, waves).ravel())
