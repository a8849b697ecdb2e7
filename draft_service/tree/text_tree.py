"""Draft of a generation whose target has another tokenizer: one chain of tokens, aligned by text.

The buffer has the draft's tokens of the committed text, up to its last token boundary. After them
comes the chain of draft tokens, which is greedy. While the committed text is the chain's, the chain
and its KV stay. Otherwise the chain is cut at the last common token boundary, and the text after it
is encoded again. Proposals are the chain's text in tokens of the target. They are a function of the
committed tokens: deterministic proposals, with probability 1 as their support. Pure, like `tree`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from draft_service.messages import OpenDraft, Proposed, SupportWeights, check_commit
from draft_service.reencoding import WINDOW, Reencoder
from draft_service.tree.block import DraftBlock, Extension
from draft_service.tree.kv_branches import Branch
from draft_service.tree.tree import CommitOutcome, SpeculationTree
from outrider.errors import InvalidRequest
from outrider.model_server.scheduler import GenerationKey

# Orders drafting ahead: assumed probability that a draft token is accepted.
_ACCEPTANCE = 0.8
# Draft tokens for n target tokens: at most this factor times n, plus the constant.
_MAX_RATIO, _MAX_MORE = 2, 4


@dataclass(frozen=True)
class TextContext:
    """A context in draft tokens; `rest`: bytes at its end that those do not have."""

    reencoder: Reencoder
    token_ids: list[int]
    rest: bytes


class TextTree(SpeculationTree):
    """`opening`: as sent, in target tokens. `buffer`: begins with `committed_len` draft tokens.

    `ahead`: bytes of the committed text that those do not have: an incomplete character.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.int64],
        committed_len: int,
        main_branch: Branch,
        opening: OpenDraft,
        reencoder: Reencoder,
        ahead: bytes,
    ) -> None:
        super().__init__(
            buffer,
            committed_len,
            main_branch,
            gamma=opening.gamma,
            ahead_gamma=opening.ahead_gamma,
            lookahead=opening.lookahead,
            fan_out=1,
        )
        self._reencoder = reencoder
        self._max_len = opening.max_len
        self._has_supports = opening.params.needs_supports(opening.verification)
        self._target_ids: list[int] = opening.token_ids.tolist()
        # Committed text after the draft tokens in the buffer, and the chain's text.
        self._ahead, self._text = ahead, b""
        # Target tokens after the committed ones, and how many of which of them were sent.
        self._ready: list[int] = []
        self._sent: list[int] = []
        # Nothing can be drafted after the chain: until it is cut, or until the next commit.
        self._is_ended = self._is_pruned = False
        self._update()

    @property
    def is_needed(self) -> bool:
        return 0 < self._gamma > len(self._ready) and self._may_grow(self._gamma)

    def _may_grow(self, num_target_tokens: int) -> bool:
        chain = self.root.token_ids
        limit = _MAX_RATIO * num_target_tokens + _MAX_MORE
        return not self._is_ended and len(chain) < min(limit, self._room)

    @property
    def _room(self) -> int:
        return len(self._buffer) - self.committed_len - 1

    @property
    def looks_ahead(self) -> bool:
        return False  # no alternatives: candidates are not needed

    def _make_extensions(self) -> Iterator[Extension]:
        num_wanted = self._gamma + self._lookahead * (self._ahead_gamma + 1)
        is_wanted = self._ahead_gamma > 0 and self._lookahead > 0 and not self._is_pruned
        is_short = len(self._ready) < num_wanted and self._may_grow(num_wanted)
        if is_wanted and is_short and not self.is_needed:
            yield Extension(_ACCEPTANCE ** len(self._ready), self.root, opens=False)

    def prune(self) -> None:
        self._is_pruned, self._extensions = True, None

    def add(
        self,
        block: DraftBlock,
        token_id: int,
        support: SupportWeights | None,
        candidates: Sequence[tuple[int, float]],
    ) -> bool:
        text = self._reencoder.draft_text(token_id)
        self._is_ended = not text or self._reencoder.is_last(token_id)
        if text:
            self.root.token_ids.append(token_id)
            self._text += text
            self._is_ended |= not self._agrees
        self._update()
        return bool(self.updates())

    @property
    def _agrees(self) -> bool:
        """Whether the chain's text begins with the committed text, as far as it goes."""
        return self._text.startswith(self._ahead) or self._ahead.startswith(self._text)

    def _update(self) -> None:
        """Encodes the chain's text for the target."""
        self._extensions = None
        self.root.gamma = min(self._room, max(len(self.root.token_ids) + 1, self._gamma))
        self._ready = []
        if self._text.startswith(self._ahead):
            text = self._text[len(self._ahead) :]
            ready = self._reencoder.target_tokens(self._target_ids[-WINDOW:], text)
            # The last token may be another one with the text after it.
            is_last_known = self._is_ended or not self._may_grow(self._gamma)
            num_known = len(ready) if is_last_known else max(0, len(ready) - 1)
            self._ready = ready[: min(num_known, self._max_len - len(self._target_ids))]
        if not self._ready and self._gamma > 0 and not self._may_grow(self._gamma):
            # Nothing to propose. A wrong token is better than a round that waits for none.
            self._ready = self._target_ids[-1:]

    def updates(self) -> list[DraftBlock]:
        num_new = len(self._ready) - self._num_sent
        if self.is_needed or num_new <= 0:
            return []
        # Ahead of a commit, blocks are sent whole.
        is_asked = self._gamma > 0 and self._num_sent < self._gamma
        is_whole = num_new >= self._ahead_gamma or self._is_ended
        return [self.root] if is_asked or is_whole else []

    @property
    def _num_sent(self) -> int:
        num = len(self._sent)
        return num if self._ready[:num] == self._sent else 0

    def proposed(self, key: GenerationKey) -> Proposed:
        """The event for the target tokens that were not sent; marks them as sent."""
        start = self._num_sent
        stop = min(len(self._ready), start + max(self._gamma, self._ahead_gamma, 1))
        token_ids, self._sent = self._ready[start:stop], self._ready[:stop]
        return Proposed(
            key=key,
            assumed_token_ids=self._ready[:start],
            base_len=len(self._target_ids) + start,
            token_ids=tuple(token_ids),
            supports=[_certain(token_id) for token_id in token_ids] if self._has_supports else None,
        )

    def commit(
        self, token_ids: Sequence[int], committed_len: int, gamma: int, ahead_gamma: int
    ) -> CommitOutcome:
        """As SpeculationTree.commit; token ids and `committed_len` are the target's."""
        check_commit(len(self._target_ids), token_ids, committed_len, self._max_len)
        agreed = _common_len(self._ready, token_ids)
        verified = [(1.0, True)] * agreed
        if agreed < min(len(self._ready), len(token_ids)):
            verified.append((1.0, False))
        self._sent = self._sent[len(token_ids) :] if agreed == len(token_ids) else []
        self._target_ids += token_ids
        self._ahead += self._reencoder.target_text(token_ids)
        self._gamma, self._ahead_gamma, self._is_pruned = gamma, ahead_gamma, False
        num_right = self._follow()
        self._update()
        return CommitOutcome(self.root, num_right, verified)

    def _follow(self) -> int:
        """Follows the committed text. The number of tokens whose KV is still right."""
        if self._text.startswith(self._ahead):
            self._take(len(self._ahead))
            self._is_ended &= bool(self.root.token_ids)
            return len(self._buffer)
        self._take(_common_len(self._text, self._ahead))
        self.root.token_ids.clear()
        self._text, self._is_ended = b"", False
        start = max(0, self.committed_len - WINDOW)
        num_kept, token_ids, self._ahead = self._reencoder.extended_draft(
            self._buffer[start : self.committed_len].tolist(), self._ahead
        )
        num_right = start + num_kept
        end = num_right + len(token_ids)
        if end + 2 > len(self._buffer):
            raise InvalidRequest("token_ids", f"the text has more than {end} draft tokens")
        self._buffer[num_right:end] = token_ids
        self.committed_len = self.root.base_len = end
        # At least the last token is run again: the next one is sampled from its logits.
        return min(num_right, end - 1)

    def _take(self, num_bytes: int) -> None:
        """Commits the chain's first tokens whose text fits into `num_bytes`."""
        chain, taken = self.root.token_ids, 0
        while chain and (size := len(self._reencoder.draft_text(chain[0]))) <= num_bytes - taken:
            self._buffer[self.committed_len] = chain.pop(0)
            self.committed_len, taken = self.committed_len + 1, taken + size
        self.root.base_len = self.committed_len
        self._text, self._ahead = self._text[taken:], self._ahead[taken:]


def _certain(token_id: int) -> SupportWeights:
    return SupportWeights(np.array([token_id]), np.ones(1, np.float32))


def _common_len(first: Sequence[Any], second: Sequence[Any]) -> int:
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return number
    return min(len(first), len(second))
