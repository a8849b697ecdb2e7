"""Counts of rounds and draft tokens of one generation, and the rates that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.speculation.verification import SourceName


@dataclass
class DraftCounts:
    """Counts of draft tokens; `num_drafts`: rounds with draft tokens."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Acceptance rate α = accepted / (accepted + rejected); None without draft tokens.

        Draft tokens after the first rejection are not counted, as in Leviathan et al. 2023, where
        τ follows from α. Accepted / drafted would fall as γ grows.
        """
        num_verified = self.num_accepted_tokens + self.num_rejected_tokens
        return self.num_accepted_tokens / num_verified if num_verified else None

    def add_draft(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """Counts a round with draft tokens."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        self.num_rejected_tokens += is_rejected


@dataclass
class SpeculationCounts(DraftCounts):
    """Counts of rounds and draft tokens of one generation.

    `num_accepted_per_pos[i]`: rounds in which draft token i was accepted.
    `num_rounds_per_gamma[g]`: rounds with g draft tokens, without the prompt's round.
    """

    num_rounds: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)
    num_rounds_per_gamma: list[int] = field(default_factory=list)
    by_source: dict[SourceName, DraftCounts] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Mean acceptance length τ: tokens per round with drafts; None without such rounds."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    def add(
        self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool, source: SourceName
    ) -> None:
        """Counts a round. `is_rejected`: its last token replaces a rejected draft token."""
        self.num_rounds += 1
        if self.num_rounds > 1:
            missing = num_draft_tokens + 1 - len(self.num_rounds_per_gamma)
            self.num_rounds_per_gamma += [0] * missing
            self.num_rounds_per_gamma[num_draft_tokens] += 1
        if not num_draft_tokens:
            return
        self.add_draft(num_draft_tokens, num_accepted, is_rejected=is_rejected)
        own = self.by_source.setdefault(source, DraftCounts())
        own.add_draft(num_draft_tokens, num_accepted, is_rejected=is_rejected)
        missing = num_draft_tokens - len(self.num_accepted_per_pos)
        self.num_accepted_per_pos += [0] * missing
        for position in range(num_accepted):
            self.num_accepted_per_pos[position] += 1
