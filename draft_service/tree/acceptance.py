"""Acceptance model of the draft: probabilities of the tokens that the target may emit.

Greedy and coupled: a softmax of the draft's scores. Its sharpness is learnt from verify results, so
that predicted and observed acceptance rates agree. Rejection and block: probabilities by rank only.
The scores contain the noise that recovered and bonus tokens are sampled with, and the order of
drafting must not depend on the noise of tokens still to be verified (docs/concepts/exactness.md).
No I/O. The probabilities only order the drafting: a wrong one costs speed, not exactness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.engine import SampledToken

_LEARNING_RATE = 0.02
_SHARPNESS_RANGE = (0.05, 20.0)
# Share of rejections whose recovered token has rank 0, 1, … among the other candidates; also used
# for bonus tokens other than the guess. Measured on random distributions and a synthetic pair.
_RANK_SHARES = (0.36, 0.19, 0.14, 0.08, 0.06, 0.04, 0.03)


class DraftAcceptance:
    """Acceptance model of one replica, learnt from all of its generations."""

    def __init__(self) -> None:
        self._sharpness = 1.0
        self._acceptance = 0.7

    def estimate(self, sampled: SampledToken, *, has_supports: bool) -> list[tuple[int, float]]:
        """(token, probability that the target emits it) at the position of `sampled`; sum <= 1."""
        ids = sampled.candidate_ids.tolist()
        if has_supports:
            # Their number must not depend on the noise: on whether the token is a candidate.
            others = [i for i in ids if i != sampled.token_id][: len(_RANK_SHARES)]
            rest = 1 - self._acceptance
            shared = [(i, rest * s) for i, s in zip(others, _RANK_SHARES, strict=False)]
            return [(sampled.token_id, self._acceptance), *shared]
        scores = sampled.candidate_scores.tolist()
        # Plain Python is the fastest for eight numbers.
        weights = [math.exp((score - scores[0]) * self._sharpness) for score in scores]
        total = sum(weights)
        return [(i, w / total) for i, w in zip(ids, weights, strict=True)]

    def observe(self, verified: Sequence[tuple[float, bool]], *, has_supports: bool) -> None:
        """Learns from verified draft tokens: (predicted probability, whether it was accepted).

        Without supports a prediction of 1 is skipped: there was one candidate, or no prediction.
        """
        for prob, is_accepted in verified:
            if has_supports:
                self._acceptance += _LEARNING_RATE * (is_accepted - self._acceptance)
            elif prob < 1:
                low, high = _SHARPNESS_RANGE
                step = math.exp(_LEARNING_RATE * 2 * (is_accepted - prob))
                self._sharpness = min(max(self._sharpness * step, low), high)
