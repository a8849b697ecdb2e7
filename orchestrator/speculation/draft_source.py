"""Draft sources: where the draft tokens of a generation come from.

`DraftSource` is the seam for other sources. The replicas of the draft tier are one
(`orchestrator.replicas.tier_drafts`), `NoDrafts` is another. How many draft tokens a round asks
for, and how long it waits, is decided above a source: `drafting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.speculation.verification import Proposal
from outrider.sampling.params import SamplingParams, Verification


@dataclass(frozen=True)
class DraftRequest:
    """What a draft source has to know of a generation.

    `token_ids`: the generation's own list of committed tokens, which grows.
    """

    session_id: str
    epoch: int
    token_ids: Sequence[int]
    prompt_len: int
    max_len: int
    params: SamplingParams
    verification: Verification
    fan_out: int
    vocab_size: int


class DraftSource(Protocol):
    """Draft tokens of one generation. Used by the generation's task only.

    A source reads the committed tokens from the generation's own list, which grows. It raises
    nothing: without proposals the generation decodes plainly. Each round calls `refresh`, `propose`
    and `commit`, and `wait` where there was no proposal.
    """

    @property
    def is_open(self) -> bool:
        """Whether proposals may come."""

    @property
    def may_open(self) -> bool:
        """Whether opening it can succeed at all."""

    @property
    def replica(self) -> str | None:
        """Address of the replica in use; None: none is, or the source has no replicas."""

    @property
    def cached_len(self) -> int:
        """Committed tokens whose keys and values the replica is known to hold."""

    @property
    def num_behind(self) -> int:
        """Committed tokens that the source has to process before it can propose anything."""

    @property
    def wire_bytes(self) -> int:
        """Bytes sent and received for this generation."""

    def open(self, gamma: int, lookahead: int) -> bool:
        """Start, or start again after a loss; whether it is open now.

        `gamma`: draft tokens wanted a round; 0: do not start now. `lookahead`: how many rounds
        ahead it should work. The first proposal is for a later round than the one under way.
        """

    def refresh(self) -> None:
        """Leave a replica that is draining, where another one is there."""

    def propose(self, least: int = 1) -> Proposal | None:
        """The longest proposal that continues the committed tokens, of at least `least` tokens."""

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        """Report what was committed since the last call.

        Ask for `gamma` draft tokens for this round, and for blocks of `ahead_gamma` ahead of the
        next ones. Drops proposals that assumed other tokens.
        """

    async def wait(self, timeout_s: float, least: int = 1) -> Proposal | None:
        """As `propose`, after waiting at most `timeout_s` for it."""

    def rest(self) -> None:
        """Leave a replica that proposes nothing; it is not used again for a while."""

    def close(self, *, keep: bool) -> None:
        """End the generation at the source; `keep`: its session goes on in a later call."""


class NoDrafts:
    """The source without drafts: every round is plain decoding."""

    is_open = may_open = False
    replica: str | None = None
    cached_len = num_behind = wire_bytes = 0

    def open(self, gamma: int, lookahead: int) -> bool:
        return False

    def refresh(self) -> None:
        pass

    def propose(self, least: int = 1) -> Proposal | None:
        return None

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        pass

    async def wait(self, timeout_s: float, least: int = 1) -> Proposal | None:
        return None

    def rest(self) -> None:
        pass

    def close(self, *, keep: bool) -> None:
        pass
