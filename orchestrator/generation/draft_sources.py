"""Draft sources of one generation, created from its request and the orchestrator's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.generation.context import GenerationContext
from orchestrator.generation.output_format import OutputFormat
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.state import GenerationState
from orchestrator.replicas.tier_drafts import TierDrafts
from orchestrator.sessions import Lease
from orchestrator.speculation.draft_source import DraftRequest, DraftSource, NoDrafts
from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.lookup import LookupDrafts, TokenIndex
from orchestrator.speculation.router import Router
from orchestrator.speculation.verification import SourceName
from outrider.grammar import Grammar


@dataclass(frozen=True)
class DraftSources:
    """Creates the draft sources that a request allows, and the router among them."""

    context: GenerationContext
    request: GenerationRequest
    lease: Lease
    state: GenerationState

    @property
    def may_draft(self) -> bool:
        """Whether rounds may have draft tokens of the draft tier."""
        return self.context.drafts is not None and self._allows(SourceName.MODEL)

    @property
    def may_look_up(self) -> bool:
        """Whether rounds may have draft tokens of prompt lookup.

        A request that waits for all its draft tokens gets them from the draft tier.
        """
        is_left_out = self.request.waits_for_draft and self.may_draft
        return self.context.has_lookup and self._allows(SourceName.LOOKUP) and not is_left_out

    def _allows(self, source: SourceName) -> bool:
        request = self.request
        is_named = request.draft_source in (SourceName.AUTO, source)
        return is_named and request.max_gamma > 0 and request.gamma != 0

    def tier(self) -> DraftSource:
        """The draft tier, if the request may use it."""
        drafts, previous = self.context.drafts, self.lease.record.draft_kv
        if drafts is None or not self.may_draft:
            return NoDrafts()
        replica = previous.replica if previous is not None else None
        return TierDrafts(drafts, self._draft_request(), replica, self.context.rollout)

    def output_format(self, grammar: Grammar | None) -> OutputFormat | None:
        """The output's format; None: free text."""
        model, state = self.context.targets.model, self.state
        if grammar is None or model is None:
            return None
        return OutputFormat(
            grammar,
            model.eos_token_ids,
            state.token_ids,
            state.prompt_len,
            has_supports=self.request.params.needs_supports(self.request.verification),
        )

    def router(
        self, tier: DraftSource, policy: GammaPolicy, output_format: OutputFormat | None
    ) -> Router:
        """The router among `tier`, prompt lookup, tokens that the format forces, and none."""
        request, costs = self.request, self.context.costs
        lookup = None
        if self.may_look_up:
            lookup = LookupDrafts(self._draft_request(), costs.shared.matches, self._past_outputs())
        return Router(
            Drafting(tier, policy, costs, request.lookahead),
            lookup,
            policy,
            costs.shared.choices,
            max_gamma=request.max_gamma,
            fixed_gamma=request.gamma,
            is_requested=request.draft_source is not SourceName.AUTO,
            forced=output_format.forced if output_format and self._may_force else None,
        )

    @property
    def _may_force(self) -> bool:
        """Whether rounds may have draft tokens that the output's format forces."""
        return self._allows(SourceName.AUTO) and not self.request.waits_for_draft

    @property
    def pool_owner(self) -> str:
        """Owner of the past outputs that lookup may search: this client with this model.

        A model that replaces another one may have other tokens. Names of clients have no slash.
        """
        model = self.context.targets.model
        assert model is not None, "a target was connected"
        return f"{self.lease.client}/{model.model_fingerprint}"

    def _past_outputs(self) -> Sequence[TokenIndex]:
        """The client's past outputs, unless they might depend on this generation's seed.

        An output of the same seed has the same noise: as draft tokens of rejection or block
        verification its tokens would bias the output. A seed of the server's is a new one.
        """
        request, pool = self.request, self.context.past_outputs
        is_biased = request.is_seeded and request.params.needs_supports(request.verification)
        return pool.indexes(self.pool_owner) if pool is not None and not is_biased else ()

    def _draft_request(self) -> DraftRequest:
        request, state = self.request, self.state
        model = self.context.targets.model
        assert model is not None, "a target was connected"
        return DraftRequest(
            session_id=self.lease.scoped_id,
            epoch=self.lease.epoch,
            token_ids=state.token_ids,
            prompt_len=state.prompt_len,
            max_len=state.max_len,
            params=request.params,
            verification=request.verification,
            fan_out=request.fan_out,
            vocab_size=model.vocab_size,
        )
