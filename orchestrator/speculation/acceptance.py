"""Acceptance models: probability that draft tokens are accepted.

`AcceptanceModel`, for draft tokens of a model: by position in the block. `MatchAcceptance`, for
tokens found by lookup: by length of the match. Both combine recent counts with a prior. The prior
of a generation is the model of all generations; the prior of that one is a constant.
"""

from __future__ import annotations

# Factor on all counts per round, or per token of lookup. Choice: about the last 1 / (1 - 0.98) = 50
# count.
_DECAY = 0.98
# Weight of the prior, in verified draft tokens. Choice: a few rounds outweigh it.
_PRIOR_WEIGHT = 8.0
# Acceptance rate before anything is measured. Choice: optimistic, so that a new pair is tried.
_FIRST_RATE = 0.7
# The same of lookup, by level. Choice: below the rates in Python source, so that free text is not
# slowed down.
_FIRST_MATCH_RATES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


class AcceptanceModel:
    """Acceptance of one generation, with the shared model as `prior`; the shared one has none."""

    def __init__(self, prior: AcceptanceModel | None = None) -> None:
        self._prior = prior
        # By position; draft tokens after a rejection are not verified.
        self._num_verified: list[float] = []
        self._num_accepted: list[float] = []

    def observe(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """Counts a round. Draft tokens after the rejected one are not counted."""
        self._num_verified = [count * _DECAY for count in self._num_verified]
        self._num_accepted = [count * _DECAY for count in self._num_accepted]
        missing = num_draft_tokens - len(self._num_verified)
        self._num_verified += [0.0] * missing
        self._num_accepted += [0.0] * missing
        for position in range(num_accepted):
            self._num_verified[position] += 1
            self._num_accepted[position] += 1
        if is_rejected:
            self._num_verified[num_accepted] += 1
        if self._prior is not None:
            self._prior.observe(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    def acceptance_rates(self, gamma: int) -> list[float]:
        """[k]: probability that draft token k is accepted if those before it are."""
        if self._prior is not None:
            priors = self._prior.acceptance_rates(gamma)
        else:
            priors = [_FIRST_RATE] * gamma
        rates: list[float] = []
        for position, prior in enumerate(priors):
            if position >= len(self._num_verified):
                # Not drafted yet: the mean of the prior and the position before.
                rates.append(0.5 * (prior + rates[-1]) if rates else prior)
                continue
            verified, accepted = self._num_verified[position], self._num_accepted[position]
            rates.append((accepted + _PRIOR_WEIGHT * prior) / (verified + _PRIOR_WEIGHT))
        return rates

    def survival(self, gamma: int) -> list[float]:
        """[k]: probability that at least k + 1 draft tokens are accepted."""
        product, survival = 1.0, []
        for rate in self.acceptance_rates(gamma):
            product *= rate
            survival.append(product)
        return survival


class MatchAcceptance:
    """Probability that the token after a match is right, by level: the length in powers of 2.

    Every token that lookup could have proposed is counted, whether or not it was used.
    """

    def __init__(self, prior: MatchAcceptance | None = None) -> None:
        self._prior = prior
        self._num_seen = [0.0] * len(_FIRST_MATCH_RATES)
        self._num_right = [0.0] * len(_FIRST_MATCH_RATES)

    def observe(self, match_len: int, is_right: bool) -> None:
        """Counts a token after a match of `match_len` tokens."""
        level = _level(match_len)
        self._num_seen[level] = _DECAY * self._num_seen[level] + 1
        self._num_right[level] = _DECAY * self._num_right[level] + is_right
        if self._prior is not None:
            self._prior.observe(match_len, is_right)

    def rates(self) -> list[float]:
        """[level]: acceptance rate."""
        priors = self._prior.rates() if self._prior is not None else _FIRST_MATCH_RATES
        return [
            (right + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT)
            for seen, right, prior in zip(self._num_seen, self._num_right, priors, strict=True)
        ]

    def survival(self, match_len: int, gamma: int) -> list[float]:
        """[k]: probability that at least k + 1 tokens after the match are right."""
        rates = self.rates()
        product, survival = 1.0, []
        for length in range(match_len, match_len + gamma):
            product *= rates[_level(length)]
            survival.append(product)
        return survival


def _level(match_len: int) -> int:
    """0, 1, 2, … for 2, 3 to 4, 5 to 8, … tokens."""
    return min((match_len - 1).bit_length(), len(_FIRST_MATCH_RATES)) - 1
