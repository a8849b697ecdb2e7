"""One generation's chain of blocks: what is committed, what is drafted, what is drafted ahead.

Pure state machine: no model, no randomness, no I/O. The chain's first block continues the
committed context and is, or is about to be, under verification; each further block assumes that
all of the block before it is accepted and that a guessed token follows. `look-ahead` is how many
of those there may be.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from draft_service.messages import Outcome, SupportWeights
from outrider.errors import InvalidRequest

ROOT_ID = 0
_ROOT_OUTCOME = Outcome(0, 0, 0)


@dataclass(eq=False)
class Block:
    """`gamma` draft tokens from `base_len` on, some of them drawn already."""

    id: int
    outcome: Outcome
    base_len: int
    gamma: int
    num_tokens: int = 0
    supports: list[SupportWeights] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.num_tokens == self.gamma

    @property
    def end(self) -> int:
        return self.base_len + self.num_tokens


class Chain:
    """`token_ids` is the generation's buffer, int64 [max_len]; `length` of it are in use."""

    def __init__(
        self,
        token_ids: npt.NDArray[np.int64],
        committed_len: int,
        gamma: int,
        lookahead: int,
    ) -> None:
        self.token_ids = token_ids
        self.committed_len = committed_len
        self._gamma = gamma
        self._lookahead = lookahead
        self._num_blocks = 0
        # The prompt's round has no draft tokens: it is an empty block that is under verification.
        self._blocks = [Block(ROOT_ID, _ROOT_OUTCOME, committed_len, gamma=0)]

    @property
    def length(self) -> int:
        """Committed and drafted tokens, the guesses between blocks included."""
        return self._blocks[-1].end

    @property
    def next_is_guess(self) -> bool:
        """Whether the next token to draw is the guess that opens a further block."""
        return self._blocks[-1].is_complete

    @property
    def current_block(self) -> Block:
        """The block that the next drawn token belongs to, unless it is a guess."""
        return self._blocks[-1]

    @property
    def wants_token(self) -> bool:
        last = self._blocks[-1]
        if not last.is_complete:
            return True
        # A guess and at least one draft token must fit.
        has_room = last.end + 2 <= len(self.token_ids)
        return has_room and self._gamma > 0 and len(self._blocks) <= self._lookahead

    def add(self, token_id: int, support: SupportWeights | None) -> Block | None:
        """Appends a drawn token; returns the block that it completes."""
        last = self._blocks[-1]
        self.token_ids[last.end] = token_id
        if last.is_complete:
            outcome = Outcome(last.id, last.num_tokens, token_id)
            self._start_block(outcome, last.end + 1)
            return None
        last.num_tokens += 1
        if support is not None:
            last.supports.append(support)
        return last if last.is_complete else None

    def _start_block(self, outcome: Outcome, base_len: int) -> None:
        self._num_blocks += 1
        room = len(self.token_ids) - base_len
        self._blocks.append(Block(self._num_blocks, outcome, base_len, min(self._gamma, room)))

    def commit(self, outcome: Outcome, committed_len: int, gamma: int) -> int:
        """Takes a round's outcome; returns how many tokens of the buffer are still right.

        The branch that assumed it is kept, whole or half drafted; otherwise a new block starts.
        Raises InvalidRequest if the outcome does not continue what is committed here.
        """
        first = self._blocks[0]
        num_accepted = outcome.num_accepted
        if outcome.parent not in (ROOT_ID, first.id):
            raise InvalidRequest("parent", f"{outcome.parent} is not {first.id}, the last proposal")
        if num_accepted > (first.num_tokens if outcome.parent == first.id else 0):
            raise InvalidRequest("num_accepted", f"{num_accepted} exceeds the proposal")
        if committed_len != self.committed_len + num_accepted + 1:
            raise InvalidRequest(
                "committed_len",
                f"{committed_len}; here it is {self.committed_len} + {num_accepted} + 1",
            )
        if committed_len > len(self.token_ids):
            raise InvalidRequest("committed_len", f"{committed_len} exceeds max_len")
        self._gamma = gamma
        self.committed_len = committed_len
        if len(self._blocks) > 1 and self._blocks[1].outcome == outcome and gamma > 0:
            del self._blocks[0]
            return self.length
        self._blocks.clear()
        self.token_ids[committed_len - 1] = outcome.next_token
        self._start_block(outcome, committed_len)
        return committed_len - 1
