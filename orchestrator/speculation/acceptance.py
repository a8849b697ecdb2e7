"""How far draft tokens survive: measured acceptance by position, over a prior.

Pure. Recent rounds count more than old ones. Knows nothing of costs or γ.
"""

from __future__ import annotations

# Of the evidence, this much is left after each round: the last fifty or so speak.
_DECAY = 0.98
# A prior counts as much as so many judged tokens.
_PRIOR_WEIGHT = 8.0
# With nothing measured at all: a draft somebody chose to deploy.
_FIRST_GUESS = 0.7


class AcceptanceModel:
    """Of one session, with the pair's as `prior`; of a pair, with none."""

    def __init__(self, prior: AcceptanceModel | None = None) -> None:
        self._prior = prior
        self._num_judged: list[float] = []
        self._num_accepted: list[float] = []

    def observe(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """A round's verdict: tokens behind a rejection were not judged, and say nothing."""
        self._num_judged = [count * _DECAY for count in self._num_judged]
        self._num_accepted = [count * _DECAY for count in self._num_accepted]
        missing = num_draft_tokens - len(self._num_judged)
        self._num_judged += [0.0] * missing
        self._num_accepted += [0.0] * missing
        for position in range(num_accepted):
            self._num_judged[position] += 1
            self._num_accepted[position] += 1
        if is_rejected:
            self._num_judged[num_accepted] += 1
        if self._prior is not None:
            self._prior.observe(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    def acceptances(self, gamma: int) -> list[float]:
        """[k]: chance that draft token k is accepted if those before it are."""
        if self._prior is not None:
            priors = self._prior.acceptances(gamma)
        else:
            priors = [_FIRST_GUESS] * gamma
        chances: list[float] = []
        for position, prior in enumerate(priors):
            if position >= len(self._num_judged):
                # Where nobody has been: what was seen before goes on.
                chances.append(0.5 * (prior + chances[-1]) if chances else prior)
                continue
            judged, accepted = self._num_judged[position], self._num_accepted[position]
            chances.append((accepted + _PRIOR_WEIGHT * prior) / (judged + _PRIOR_WEIGHT))
        return chances

    def prefixes(self, gamma: int) -> list[float]:
        """[k]: chance that at least k + 1 draft tokens are accepted."""
        product, survival = 1.0, []
        for chance in self.acceptances(gamma):
            product *= chance
            survival.append(product)
        return survival
