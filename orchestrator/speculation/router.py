"""Router: chooses the draft source of each round, by expected tokens per second.

The sources are the draft tier, prompt lookup, tokens that the output's format forces (they are
always accepted), and none (plain decoding). What a round with draft
tokens of the tier is worth is known from its γ policy. A proposal of prompt lookup costs nothing
and is ready at once, so its rounds are worth

    value(γ) = tokens(γ) / (pass with γ draft tokens + network + queue)

with the acceptance rates of `lookup.MatchAcceptance`. Those are measured in every round, whichever
source it uses. So there is nothing to try out: a lookup is used once it is expected to be faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.gamma import (
    HYSTERESIS,
    PLAIN_HYSTERESIS,
    ROUNDS_PER_DECISION,
    GammaPolicy,
)
from orchestrator.speculation.lookup import LookupDrafts
from orchestrator.speculation.round_values import verify_round_s
from orchestrator.speculation.verification import Choices, Proposal, SourceName

# After this many rounds of lookup in a row, the draft tier is not asked until it is chosen again.
# Choice: one round of lookup between two of the tier does not interrupt its drafting.
_MAX_SKIPPED = 2


class Reason(StrEnum):
    """Why a source was chosen, as in orchestrator.proto's SourceStats."""

    REQUESTED = "requested"
    ONLY = "only"
    NO_MATCH = "no match"
    FASTER = "faster"


@dataclass(frozen=True)
class _Offer:
    """A proposal that costs nothing, and its value."""

    proposal: Proposal
    tokens_per_s: float
    plain_tokens_per_s: float


class Router:
    """Drafting of one generation from several sources. Used by its task only, like `Drafting`.

    `model`: drafting from the draft tier, which may have no source. `lookup` None: not used.
    `fixed_gamma`: the request's own γ. `is_requested`: the request names the source. `shared`:
    choices of all generations, for metrics. `forced`: proposes the tokens that must follow the
    committed ones, at most the given number.
    """

    def __init__(
        self,
        model: Drafting,
        lookup: LookupDrafts | None,
        policy: GammaPolicy,
        shared: Choices,
        *,
        max_gamma: int,
        fixed_gamma: int | None,
        is_requested: bool,
        forced: Callable[[int], Proposal | None] | None = None,
    ) -> None:
        self._model = model
        self._lookup = lookup
        self._policy = policy
        self._shared = shared
        self._max_gamma = max_gamma if fixed_gamma is None else fixed_gamma
        self._is_fixed = fixed_gamma is not None
        self._is_requested = is_requested
        self._forced = forced
        # [γ]: seconds of a round with ready draft tokens, for some rounds.
        self._round_s: tuple[float, ...] = ()
        self._num_rounds_left = 0
        # Rounds of lookup in a row.
        self._num_skipped = 0
        self.choices: Choices = Counter()
        # Expected tokens per second when the sources were last compared.
        self.expected: dict[SourceName, float] = {}
        if lookup is not None:
            lookup.open(self._max_gamma, 0)

    @property
    def num_lookahead_hits(self) -> int:
        """As `Drafting.num_lookahead_hits`."""
        return self._model.num_lookahead_hits

    @property
    def waited_s(self) -> float:
        """As `Drafting.waited_s`."""
        return self._model.waited_s

    @property
    def has_waited(self) -> bool:
        """As `Drafting.has_waited`."""
        return self._model.has_waited

    def open(self) -> None:
        """As `Drafting.open`."""
        self._model.open()

    def next(self, max_draft_tokens: int) -> Proposal | None:
        """As `Drafting.next`, from the source of the most expected tokens per second."""
        offer = self._offer(max_draft_tokens)
        if offer is not None and self._is_faster(offer, max_draft_tokens):
            self._num_skipped += 1
            reason = Reason.REQUESTED if self._is_requested else Reason.FASTER
            self._choose(offer.proposal.source, reason)
            self._model.skip(pauses=self._num_skipped > _MAX_SKIPPED)
            return offer.proposal
        self._num_skipped = 0
        if max_draft_tokens > 0:
            self._choose(self._other, self._other_reason(has_offer=offer is not None))
        return self._model.next(max_draft_tokens)

    async def wait(self, max_draft_tokens: int) -> Proposal | None:
        """As `Drafting.wait`."""
        return await self._model.wait(max_draft_tokens)

    def observe_round(
        self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool, source: SourceName
    ) -> None:
        """A round with draft tokens of `source` was verified."""
        self._num_rounds_left -= 1
        if source in (SourceName.LOOKUP, SourceName.GRAMMAR):
            self._policy.observe_other_round()
        else:
            self._model.observe_round(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    def close(self, *, keep: bool) -> None:
        """As `Drafting.close`."""
        self._model.close(keep=keep)

    @property
    def _other(self) -> SourceName:
        """The source of rounds without lookup."""
        return SourceName.MODEL if self._model.is_drafting else SourceName.NONE

    def _other_reason(self, *, has_offer: bool) -> Reason:
        if self._lookup is not None:
            return Reason.FASTER if has_offer else Reason.NO_MATCH
        return Reason.REQUESTED if self._is_requested else Reason.ONLY

    def _choose(self, source: SourceName, reason: Reason) -> None:
        self.choices[source, reason] += 1
        self._shared[source, reason] += 1

    def _offer(self, max_draft_tokens: int) -> _Offer | None:
        """The best proposal that costs nothing; None: there is none."""
        if max_draft_tokens <= 0:
            return None
        offers = [self._forced_offer(max_draft_tokens), self._lookup_offer(max_draft_tokens)]
        found = [offer for offer in offers if offer is not None]
        return max(found, key=lambda offer: offer.tokens_per_s, default=None)

    def _forced_offer(self, max_draft_tokens: int) -> _Offer | None:
        num = min(max_draft_tokens, self._max_gamma)
        proposal = self._forced(num) if self._forced is not None and num else None
        if proposal is None:
            return None
        return self._valued(proposal, (1.0,) * len(proposal.token_ids))

    def _lookup_offer(self, max_draft_tokens: int) -> _Offer | None:
        lookup = self._lookup
        proposal = lookup.propose() if lookup is not None else None
        if lookup is None or proposal is None:
            return None
        num = min(len(proposal.token_ids), max_draft_tokens)
        return self._valued(proposal, lookup.acceptance.survival(lookup.match_len, num))

    def _valued(self, proposal: Proposal, survival: Sequence[float]) -> _Offer:
        """The proposal, cut to the best γ. `survival[i]`: probability that i + 1 are accepted."""
        num = len(survival)
        tokens = accumulate((1.0, *survival))
        rates = [t / s for t, s in zip(tokens, self._seconds(), strict=False)]
        gamma = num if self._is_fixed else max(range(1, num + 1), key=lambda g: rates[g])
        return _Offer(proposal.head(gamma), rates[gamma], rates[0])

    def _seconds(self) -> tuple[float, ...]:
        """[γ]: seconds of a round. Before the target reports costs, all take 1."""
        if self._num_rounds_left <= 0 or not self._round_s:
            self._num_rounds_left = ROUNDS_PER_DECISION
            target = self._policy.costs.target
            steps_s = target.steps_s(self._max_gamma)
            has_costs = steps_s[0] > 0
            self._round_s = verify_round_s(target, steps_s) if has_costs else (1.0,) * len(steps_s)
        return self._round_s

    def _is_faster(self, offer: _Offer, max_draft_tokens: int) -> bool:
        """Compares the offer with the draft tier and with plain decoding."""
        self.expected[offer.proposal.source] = offer.tokens_per_s
        self.expected[SourceName.NONE] = offer.plain_tokens_per_s
        if self._model.is_drafting:
            model = self._model.expected_tokens_per_s(max_draft_tokens)
            if model is None:  # no costs are reported yet
                return False
            self.expected[SourceName.MODEL] = model
            if offer.tokens_per_s < HYSTERESIS * model:
                return False
        return self._is_fixed or offer.tokens_per_s >= PLAIN_HYSTERESIS * offer.plain_tokens_per_s
