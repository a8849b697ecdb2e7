"""Drafting of one generation: the policy over its draft source.

Decides round by round how many draft tokens to ask for and how long to wait for them. Drafts are
optional: with a source that is slow, lost or wrong there is no proposal, and nothing else happens.
"""

from __future__ import annotations

import time

from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.draft_source import DraftSource
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import Proposal


class Drafting:
    """Of one generation. Each round: `next` right after its commitment, `wait` if that gave None.

    `lookahead`: the most rounds ahead that the source may work. `room`, in both methods: how many
    more draft tokens the output can take.
    """

    def __init__(
        self, source: DraftSource, policy: GammaPolicy, costs: CostBook, lookahead: int
    ) -> None:
        self._source = source
        self._policy = policy
        self._costs = costs
        self._lookahead = lookahead
        # By then the source has processed the tokens that it was behind, as far as is known.
        self._prompt_until = 0.0
        # Whether the round under way waits for a proposal.
        self._is_waiting = False
        # While γ = 0 the source hears nothing after the first commit, until drafts are wanted.
        self._is_quiet = False
        # Proposals that were there before the verify result that they follow.
        self.num_lookahead_hits = 0
        self.waited_s = 0.0

    def open(self) -> None:
        """Open the source if it is not open, at another replica if it lost the last one."""
        source, policy = self._source, self._policy
        if source.is_open or not source.may_open:
            return
        if source.open(policy.decision.gamma, policy.lookahead(self._lookahead)):
            policy.costs.draft_side = self._costs.draft(source.replica)
            self._is_quiet = False
            self._expect_prompt()

    def _expect_prompt(self) -> None:
        prompt_s = self._policy.costs.draft_prompt_s(self._source.num_behind)
        self._prompt_until = time.monotonic() + prompt_s

    def next(self, room: int) -> Proposal | None:
        """The proposal for what is committed, if it is there; asks the source for the next ones."""
        source = self._source
        self._is_waiting = False
        source.refresh()
        if room <= 0 or not source.is_open:
            if room > 0:
                self.open()  # its first proposal is for a later round
            return None
        decision = self._policy.decision
        if decision.gamma == 0 and self._is_quiet:
            return None
        if self._is_quiet:  # no longer: the source has to catch up first
            self._expect_prompt()
        self._is_quiet = decision.gamma == 0
        proposal = source.propose(self._least(room)) if decision.gamma else None
        if decision.gamma:
            self._policy.observe_lookahead(is_hit=proposal is not None)
        if proposal is not None:
            self.num_lookahead_hits += 1
            source.commit(0, decision.gamma)
            return proposal.head(min(room, decision.gamma))
        is_late = self._prompt_until - time.monotonic() > decision.wait_s
        is_at_prompt = is_late and not self._policy.waits_always
        waiting_gamma = 0 if is_at_prompt else decision.waiting_gamma
        self._is_waiting = waiting_gamma > 0
        source.commit(waiting_gamma, decision.gamma)
        return None

    def _least(self, room: int) -> int:
        """How many draft tokens a proposal must have.

        A round that takes fewer tokens of a block leaves the rest to a later round. So a generation
        that waits for its fixed γ takes whole blocks only.
        """
        decision = self._policy.decision
        return min(room, decision.gamma) if self._policy.waits_always and decision.is_fixed else 1

    @property
    def has_waited(self) -> bool:
        """Whether the verify request under way was held back for a proposal."""
        return self._is_waiting

    async def wait(self, room: int) -> Proposal | None:
        """After `next` returned None: wait as long as that is worth more than plain decoding."""
        if not self._is_waiting:
            return None
        source, policy = self._source, self._policy
        started_at = time.monotonic()
        proposal = await source.wait(policy.decision.wait_s, self._least(room))
        waited_s = time.monotonic() - started_at
        self.waited_s += waited_s
        # Processing the prompt takes time once; it predicts nothing for later rounds.
        late_s = waited_s - min(waited_s, max(0.0, self._prompt_until - started_at))
        if proposal is None:
            if source.is_open:  # a lost replica says nothing about the next one
                policy.observe_missing_proposal(late_s)
                if policy.waits_always:  # wait for a silent replica once, not in every round
                    source.rest()
            return None
        policy.observe_proposal(late_s, len(proposal.token_ids))
        return proposal.head(min(room, max(1, policy.decision.gamma)))

    def close(self, *, keep: bool) -> None:
        if keep and self._source.is_open:
            self._source.commit(0, 0)  # the replica keeps exactly what was committed
        self._source.close(keep=keep)
