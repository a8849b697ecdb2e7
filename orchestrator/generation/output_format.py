"""Format of one output at the orchestrator: tokens that it forces, draft tokens that it forbids.

The target applies the format; this part of it costs no pass. Forced tokens are draft tokens that
are always accepted. Draft tokens after a forbidden one are never accepted, so they are not sent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.speculation.lookup import certain
from orchestrator.speculation.verification import Proposal, SourceName
from outrider.errors import InternalError
from outrider.grammar import Grammar


class OutputFormat:
    """Position of an output in its format. Used by the generation's task only.

    `token_ids`: the generation's own list of committed tokens, which grows. `has_supports`: whether
    proposals have supports.
    """

    def __init__(
        self,
        grammar: Grammar,
        eos_token_ids: Collection[int],
        token_ids: Sequence[int],
        prompt_len: int,
        *,
        has_supports: bool,
    ) -> None:
        self._field = grammar.field
        self._has_forced = grammar.has_forced
        self._matcher = grammar.matcher()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._token_ids = token_ids
        self._prompt_len = self._num_checked = prompt_len
        self._has_supports = has_supports

    def check(self) -> None:
        """Moves behind the committed tokens. Raises InternalError unless the format allows them."""
        new_ids = list(self._token_ids[self._num_checked :])
        num_text = next(
            (i for i, t in enumerate(new_ids) if t in self._eos_token_ids), len(new_ids)
        )
        num_allowed = self._matcher.try_consume_tokens(new_ids[:num_text])
        if num_allowed == num_text < len(new_ids) and self._matcher.is_accepting():
            num_allowed += 1  # EOS, where the output may end
        self._num_checked += num_allowed
        if num_allowed < len(new_ids):
            position = self._num_checked + 1 - self._prompt_len
            raise InternalError(
                "the target does not apply the output's format",
                f"{self._field} does not allow token {position} of the output",
            )

    def forced(self, max_tokens: int) -> Proposal | None:
        """Proposes tokens that must follow the committed ones; None where there is a choice."""
        if not self._has_forced:
            return None
        token_ids = tuple(self._matcher.compute_ff_tokens()[:max_tokens])
        if not token_ids:
            return None
        supports = tuple(map(certain, token_ids)) if self._has_supports else None
        return Proposal(len(self._token_ids), token_ids, supports, source=SourceName.GRAMMAR)

    def cut(self, proposal: Proposal) -> Proposal:
        """The proposal up to its first forbidden token.

        With that token: without it, the distribution of the output would depend on its value
        (docs/concepts/exactness.md).
        """
        num_allowed = self._matcher.validate_tokens(list(proposal.token_ids))
        return proposal.head(num_allowed + 1)
