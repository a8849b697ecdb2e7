"""Drafting of one generation: applies the γ policy to its draft source.

Decides in each round how many draft tokens to ask for and how long to wait for them. Drafts are
optional: a slow, lost or wrong source yields no proposal, and the round is plain decoding.
"""

from __future__ import annotations

import time

from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.draft_source import DraftSource
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import Proposal


class Drafting:
    """Drafting of one generation. Used by its task only.

    In each round call `next` right after the commit, and `wait` if `next` returned None. Both take
    `max_draft_tokens`: how many more draft tokens the output can take. `lookahead`: how many rounds
    ahead the source may work.
    """

    def __init__(
        self, source: DraftSource, policy: GammaPolicy, costs: CostBook, lookahead: int
    ) -> None:
        self._source = source
        self._policy = policy
        self._costs = costs
        self._lookahead = lookahead
        # When the source is expected to have processed the prompt (time.monotonic).
        self._prompt_until = 0.0
        # Whether the current round waits for a proposal.
        self._is_waiting = False
        # While γ = 0 the source gets no commits after the first one.
        self._is_paused = False
        # Proposals that had arrived before the verify result that they follow.
        self.num_lookahead_hits = 0
        self.waited_s = 0.0

    @property
    def is_drafting(self) -> bool:
        """Whether rounds get draft tokens: the source is open, and γ is not 0."""
        return self._source.is_open and self._policy.decision.gamma > 0

    def open(self) -> None:
        """Open the source if it is not open, at another replica if the last one was lost."""
        source, policy = self._source, self._policy
        if source.is_open or not source.may_open:
            return
        if source.open(policy.decision.gamma, policy.lookahead(self._lookahead)):
            policy.costs.draft = self._costs.draft(source.replica)
            policy.use_model(self._costs.model(source.revision))
            self._is_paused = False
            self._expect_prompt()

    def _expect_prompt(self) -> None:
        prompt_s = self._policy.costs.draft.prompt_s(self._source.num_behind)
        self._prompt_until = time.monotonic() + prompt_s

    def next(self, max_draft_tokens: int) -> Proposal | None:
        """The proposal for the committed tokens, if it has arrived. Requests the next ones."""
        source = self._source
        self._is_waiting = False
        source.refresh()
        if max_draft_tokens <= 0:
            return None
        if not source.is_open:
            return self._reopened(max_draft_tokens)
        decision = self._policy.decision
        if decision.gamma == 0 and self._is_paused:
            return None
        if self._is_paused:  # the source has to catch up with the commits since
            self._expect_prompt()
        self._is_paused = decision.gamma == 0
        proposal = source.propose(self._min_tokens(max_draft_tokens)) if decision.gamma else None
        if decision.gamma:
            self._policy.observe_lookahead(is_hit=proposal is not None)
        if proposal is not None:
            self.num_lookahead_hits += 1
            source.commit(0, decision.gamma)
            return proposal.head(min(max_draft_tokens, decision.gamma))
        waiting_gamma = 0 if self._is_at_prompt else decision.waiting_gamma
        self._is_waiting = waiting_gamma > 0
        source.commit(waiting_gamma, decision.gamma)
        return None

    def _reopened(self, max_draft_tokens: int) -> Proposal | None:
        """What a lost replica proposed before; without such a proposal, opens the source again.

        A proposal must not be dropped because the source was lost: the loss may be due to the very
        tokens proposed, such as one that gives NaN at the draft. That would bias sampled output.
        """
        proposal = self._source.propose()
        if proposal is None or self._policy.decision.gamma == 0:
            self.open()  # its first proposal is for a later round
            return None
        self.num_lookahead_hits += 1
        return proposal.head(min(max_draft_tokens, self._policy.decision.gamma))

    def expected_tokens_per_s(self, max_draft_tokens: int) -> float | None:
        """Expected tokens per second of the next round; None while the target reports no costs.

        With a proposal that has arrived, or with one that the round would wait for, or plain.
        """
        decision, values = self._policy.decision, self._policy.values
        if values is None:
            return None
        proposal = self._source.propose(self._min_tokens(max_draft_tokens))
        if proposal is not None:
            gamma = min(len(proposal.token_ids), decision.gamma, max_draft_tokens)
            return values.tokens[gamma] / values.round_s[gamma]
        is_waited_for = self._source.is_open and not self._is_at_prompt
        return values.waiting_tokens_per_s[decision.waiting_gamma if is_waited_for else 0]

    def skip(self, *, pauses: bool) -> None:
        """The next round has draft tokens of another source. `pauses`: ask for none meanwhile.

        Otherwise the source keeps drafting, so that a later round finds its proposal ready.
        """
        source, decision = self._source, self._policy.decision
        self._is_waiting = False
        source.refresh()
        if not source.is_open:
            self.open()
        elif not self._is_paused:
            self._is_paused = pauses or decision.gamma == 0
            source.commit(0, 0 if self._is_paused else decision.gamma)

    @property
    def _is_at_prompt(self) -> bool:
        """Whether the source is still expected to process the prompt for longer than a wait."""
        is_late = self._prompt_until - time.monotonic() > self._policy.decision.wait_s
        return is_late and not self._policy.waits_always

    def _min_tokens(self, max_draft_tokens: int) -> int:
        """How many draft tokens a proposal must have.

        A round that uses part of a block leaves the rest to a later round. So a generation that
        always waits for its fixed γ takes whole blocks only.
        """
        decision = self._policy.decision
        takes_whole = self._policy.waits_always and decision.is_fixed
        return min(max_draft_tokens, decision.gamma) if takes_whole else 1

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """A round without draft tokens of another source was verified."""
        for observe in (self._policy.observe_round, self._source.observe_round):
            observe(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    @property
    def has_waited(self) -> bool:
        """Whether the current verify request was delayed for a proposal."""
        return self._is_waiting

    async def wait(self, max_draft_tokens: int) -> Proposal | None:
        """After `next` returned None: wait while that is worth more than plain decoding."""
        if not self._is_waiting:
            return None
        source, policy = self._source, self._policy
        started_at = time.monotonic()
        min_tokens = self._min_tokens(max_draft_tokens)
        proposal = await source.wait(policy.decision.wait_s, min_tokens)
        waited_s = time.monotonic() - started_at
        self.waited_s += waited_s
        # The prompt is processed once. Its time predicts nothing for later rounds.
        late_s = waited_s - min(waited_s, max(0.0, self._prompt_until - started_at))
        if proposal is None:
            if source.is_open:  # a lost replica predicts nothing for the next one
                policy.observe_missing_proposal(late_s)
                if policy.waits_always:  # one wait for an unresponsive replica, not one per round
                    source.suspend()
            return None
        policy.observe_proposal(late_s, len(proposal.token_ids))
        return proposal.head(min(max_draft_tokens, max(1, policy.decision.gamma)))

    def close(self, *, keep: bool) -> None:
        """End the generation at the source; `keep`: its session continues in a later call."""
        if keep and self._source.is_open:
            self._source.commit(0, 0)  # the replica keeps exactly the committed tokens
        self._source.close(keep=keep)
