"""Comparison of the acceptance rates of two draft revisions while generations run. Pure.

A sequential test that may be evaluated after every generation: the normal mixture test of Johari et
al. 2017 (Always Valid Inference), as a confidence interval. Its unit is the generation, not the
draft token: the draft tokens of one text are not independent.
"""

from __future__ import annotations

import math

from outrider.draft_rollout import AcceptanceSums

# Probability that one end of the interval is ever wrong during a comparison. The test assumes
# normal means; tests/orchestrator/speculation/test_comparison.py measures the rate.
FALSE_DECISION_RATE = 0.01
# Verified draft tokens of a generation that counts. Choice: with fewer its rate is mostly noise.
MIN_VERIFIED = 8
# Rounds in which a compared generation has draft tokens in any case. Otherwise a bad draft would
# soon get no rounds, and never a decision. Choice: in half of them a proposal is in time.
NUM_MEASURED_ROUNDS = 2 * MIN_VERIFIED
# Standard deviation of the mixture: the differences that the test finds soonest. Choice.
_TYPICAL_DIFFERENCE = 0.1
# Added to each sum of squared deviations, so that a few similar generations do not look certain.
# Choice: the largest squared deviation from the middle of [0, 1].
_PRIOR_SQUARES = 0.25


def difference_interval(arm: AcceptanceSums, other: AcceptanceSums) -> tuple[float, float]:
    """Confidence interval of the mean acceptance rate of `arm` minus that of `other`.

    Each end is ever wrong with a probability of at most FALSE_DECISION_RATE. Both arms get the
    larger of their variances: the smaller arm may not have had a rare output yet.
    """
    if min(arm.num, other.num) < 2:
        return -1.0, 1.0
    variance = max(_variance(arm), _variance(other)) * (1 / arm.num + 1 / other.num)
    mixture = _TYPICAL_DIFFERENCE**2
    log_bound = 0.5 * math.log1p(mixture / variance) - math.log(FALSE_DECISION_RATE)
    half = math.sqrt(2 * variance * (1 + variance / mixture) * log_bound)
    difference = arm.mean - other.mean
    return max(-1.0, difference - half), min(1.0, difference + half)


def _variance(sums: AcceptanceSums) -> float:
    """Upper estimate of the variance of a generation's rate."""
    squares = max(0.0, sums.squares - sums.num * sums.mean**2)
    return (squares + _PRIOR_SQUARES) / (sums.num - 1)
