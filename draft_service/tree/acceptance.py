"""How likely the target emits what: the draft's scores, sharpened to what verdicts have shown.

Where draft and target draw with the same noise (greedy, coupled), the chance of a candidate is a
softmax of the scores; its sharpness is learnt, so that tokens said to stand with chance c stand in
a share c of cases. Where draft tokens are judged by rejection, chances go by rank alone: scores
hold the noise that recovered and bonus tokens are drawn with, and which proposal is ready must not
depend on the noise of tokens that are still to be judged (docs/concepts/exactness.md).
Pure; chances order the drafting, so a wrong one costs speed and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from outrider.engine import SampledToken

_LEARNING_RATE = 0.02
_SHARPNESS_RANGE = (0.05, 20.0)
# Of rejections, the share whose recovered token stands at each rank of the other candidates; and of
# bonus tokens that are not the first one. As measured on random laws and a synthetic pair.
_RANK_SHARES = (0.36, 0.19, 0.14, 0.08, 0.06, 0.04, 0.03)


class DraftAcceptance:
    """Of one replica: all sessions teach it."""

    def __init__(self) -> None:
        self._sharpness = 1.0
        self._acceptance = 0.7

    def of(self, sampled: SampledToken, *, has_supports: bool) -> list[tuple[int, float]]:
        """Chances of what the target may emit where `sampled` was drawn; at most 1 in sum."""
        ids = sampled.candidate_ids.tolist()
        if has_supports:
            # As many whether the drawn token is among them or not: that, too, is a matter of noise.
            others = [i for i in ids if i != sampled.token_id][: len(_RANK_SHARES)]
            rest = 1 - self._acceptance
            shared = [(i, rest * s) for i, s in zip(others, _RANK_SHARES, strict=False)]
            return [(sampled.token_id, self._acceptance), *shared]
        scores = sampled.candidate_scores.tolist()
        # Eight numbers: plain Python is the fastest.
        weights = [math.exp((score - scores[0]) * self._sharpness) for score in scores]
        total = sum(weights)
        return [(i, w / total) for i, w in zip(ids, weights, strict=True)]

    def judged(self, judged: Sequence[tuple[float, bool]], *, has_supports: bool) -> None:
        """Draft tokens that stood, or not, with the chance each was given.

        Chance 1 teaches no sharpness: of a single candidate, or where nobody looked.
        """
        for prob, stood in judged:
            if has_supports:
                self._acceptance += _LEARNING_RATE * (stood - self._acceptance)
            elif prob < 1:
                low, high = _SHARPNESS_RANGE
                step = math.exp(_LEARNING_RATE * 2 * (stood - prob))
                self._sharpness = min(max(self._sharpness * step, low), high)
