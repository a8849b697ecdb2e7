"""Draft sources: where the draft tokens of a generation come from.

`DraftSource` is the interface for further sources. The draft tier is one
(`orchestrator.replicas.tier_drafts`), `NoDrafts` is another. `drafting` decides how many draft
tokens a round asks for and how long it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.speculation.verification import Proposal
from outrider.sampling.params import SamplingParams, Verification


@dataclass(frozen=True)
class DraftRequest:
    """Parameters of a generation for its draft source.

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

    A source reads the committed tokens from the generation's own list. It raises nothing: without
    proposals the generation decodes plainly. Each round calls `observe_round`, `refresh`,
    `propose` and `commit`, and `wait` if there was no proposal.
    """

    @property
    def is_open(self) -> bool:
        """Whether it may make proposals. After a loss `propose` may still return earlier ones."""

    @property
    def may_open(self) -> bool:
        """Whether `open` can succeed at all."""

    @property
    def replica(self) -> str | None:
        """Address of the replica in use; None if there is none."""

    @property
    def revision(self) -> str:
        """Name of the model that proposes, or will; empty if there is none."""

    @property
    def num_measured_rounds(self) -> int:
        """Rounds that must have draft tokens, because the acceptance of its model is measured."""

    @property
    def cached_len(self) -> int:
        """Committed tokens whose keys and values the replica is known to have."""

    @property
    def num_behind(self) -> int:
        """Committed tokens that the source has to process before it can propose."""

    @property
    def wire_bytes(self) -> int:
        """Bytes sent and received for this generation."""

    def open(self, gamma: int, lookahead: int) -> bool:
        """Start, or start again after a loss. Returns whether it is open now.

        `gamma`: draft tokens per round; 0: do not start. `lookahead`: how many rounds ahead it
        should work. The first proposal is for a later round than the current one.
        """

    def refresh(self) -> None:
        """Leave a replica that is draining, if there is another one."""

    def propose(self, min_tokens: int = 1) -> Proposal | None:
        """The longest proposal that continues the committed tokens; None below `min_tokens`."""

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        """Report the tokens committed since the last call.

        Asks for `gamma` draft tokens for this round, and for blocks of `ahead_gamma` draft tokens
        for later rounds. Drops proposals that assumed other tokens.
        """

    async def wait(self, timeout_s: float, min_tokens: int = 1) -> Proposal | None:
        """As `propose`, but waits at most `timeout_s` for the proposal."""

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """A round was verified; its draft tokens, if any, are the last proposal of this source."""

    def suspend(self) -> None:
        """Leave a replica that proposes nothing; it is not used again for a while."""

    def close(self, *, keep: bool) -> None:
        """End the generation at the source; `keep`: its session continues in a later call."""


class NoDrafts:
    """Source without draft tokens: every round is plain decoding."""

    is_open = may_open = False
    replica: str | None = None
    revision = ""
    cached_len = num_behind = wire_bytes = num_measured_rounds = 0

    def open(self, gamma: int, lookahead: int) -> bool:
        return False

    def refresh(self) -> None:
        pass

    def propose(self, min_tokens: int = 1) -> Proposal | None:
        return None

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        pass

    async def wait(self, timeout_s: float, min_tokens: int = 1) -> Proposal | None:
        return None

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        pass

    def suspend(self) -> None:
        pass

    def close(self, *, keep: bool) -> None:
        pass
