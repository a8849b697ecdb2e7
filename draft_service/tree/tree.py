"""One generation's tree of blocks: what is committed, drafted, and drafted ahead of the verdict.

Pure state machine: no model, no randomness, no I/O. The root block continues the committed context
and is under verification, or about to be. A child continues its parent's first `position` tokens
and one more that the target may emit there: a rejection's recovered token, or the bonus after all
of them. A commit is tokens: it walks the tree, and what it does not walk through is dropped.

Likelier outcomes are drafted first and get more tokens, as in Saguaro (arXiv 2603.03251).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from draft_service.messages import SupportWeights
from draft_service.tree.block import Alternative, DraftBlock, Extension
from draft_service.tree.kv_branches import Branch
from outrider.errors import InvalidRequest

# Chances below this are not worth a row even of an idle device.
MIN_PROB = 0.005


class Walk(NamedTuple):
    """Where a commit led: of the strand of `source`, the first `num_right` tokens are right.

    `judged`: for each draft token that the target has decided on, its chance and whether it stood.
    """

    source: DraftBlock
    num_right: int
    judged: list[tuple[float, bool]]


class SpeculationTree:
    """`buffer` is the generation's, int64 [max_len]; `committed_len` tokens of it are committed.

    `gamma` draft tokens for the context that is committed, `ahead_gamma` for blocks drafted ahead;
    `lookahead` rounds ahead at most, `fan_out` outcomes of each; what is ready is told, of blocks
    with supports only what is likely unless `tells_unlikely`.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.int64],
        committed_len: int,
        trunk: Branch,
        *,
        gamma: int,
        ahead_gamma: int,
        lookahead: int,
        fan_out: int,
        tells_unlikely: bool = False,
    ) -> None:
        self._buffer = buffer
        self.committed_len = committed_len
        self._gamma, self._ahead_gamma = gamma, ahead_gamma
        self._lookahead, self._fan_out = lookahead, fan_out
        self._tells_unlikely = tells_unlikely
        self._num_blocks = 0
        # How many of the root's tokens are committed already.
        self._num_root_tokens = 0
        # Kept until something changes: most trees do not, in most steps.
        self._extensions: list[Extension] | None = None
        self.root = self._fresh(trunk)

    @property
    def room_for_child(self) -> int:
        """Tokens that a block opened now adds to its strand: what decides, and its own."""
        return self._ahead_gamma + 1

    @property
    def room_for_branch(self) -> int:
        """Tokens that a fork may come to hold: its blocks, and what decides between them."""
        return self.room_for_child * self._lookahead + 1

    @property
    def is_needed(self) -> bool:
        """The orchestrator waits, or is about to, for tokens that are still to be drawn."""
        return not self.root.is_complete

    def blocks(self) -> Iterator[DraftBlock]:
        return self.root.descendants()

    def may_extend(self, block: DraftBlock) -> bool:
        """Whether children of the block may be drafted, within look-ahead, fan-out and room."""
        if self._ahead_gamma == 0 or len(block.children) >= self._fan_out:
            return False
        # The token that decides and at least one draft token after it must fit.
        return self._depth(block) < self._lookahead and block.end + 2 <= len(self._buffer)

    def may_open(self, block: DraftBlock) -> bool:
        """Whether an alternative may be opened; one place is kept for what follows the guess.

        That is mostly the likeliest of all, and known last.
        """
        num_kept = 0 if block.has_guess else 1
        has_place = len(block.children) + num_kept < self._fan_out
        return bool(block.alternatives) and has_place and self.may_extend(block)

    def _depth(self, block: DraftBlock) -> int:
        depth = 0
        while block is not self.root:
            assert block.parent is not None, "only the root has none"
            block, depth = block.parent, depth + 1
        return depth

    def tokens(self, block: DraftBlock, start: int) -> list[int]:
        """Tokens of the block's path from position `start` to its end."""
        own = block.token_ids
        if start >= block.base_len:
            return own[start - block.base_len :]
        if block is self.root:
            return [*self._buffer[start : block.base_len].tolist(), *own]
        assert block.parent is not None, "only the root has none"
        above = self.tokens(block.parent, start) if start < block.base_len - 1 else []
        return [*above[: block.base_len - 1 - start], block.next_token, *own]

    def context(self, block: DraftBlock) -> npt.NDArray[np.int64]:
        """The whole path to the block's end, for processors that look back."""
        start = self.root.base_len
        return np.concatenate(
            (self._buffer[:start], np.asarray(self.tokens(block, start), np.int64))
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether chances matter: else nothing but the root is ever drafted."""
        return self._lookahead > 0 and self._ahead_gamma > 0

    def add(
        self,
        block: DraftBlock,
        token_id: int,
        support: SupportWeights | None,
        candidates: Sequence[tuple[int, float]],
    ) -> bool:
        """A token was drawn: the block's next, or its guess; True if the block is to be told.

        `candidates`: what the target may emit there and how likely that is, the token included;
        empty where that does not matter.
        """
        self._extensions = None
        is_guess = block.is_complete
        reach = block.reach[-1]
        stands = self._note_alternatives(block, token_id, candidates, is_guess)
        if is_guess:
            block.has_guess = True
            return False
        block.token_ids.append(token_id)
        block.reach.append(reach * stands)
        if support is not None:
            block.supports.append(support)
        return self._has_update(block)

    def updates(self) -> list[DraftBlock]:
        """After a commit: what is to be told by now, and was not when it was drawn."""
        return [block for block in self.blocks() if self._has_update(block)]

    def _has_update(self, block: DraftBlock) -> bool:
        if block is self.root:
            return self._gamma > 0 and block.is_complete and block.has_unsent
        is_ready = block.has_unsent and (block.is_complete or block.is_half)
        return is_ready and (self._tells_unlikely or block.is_likely)

    def _note_alternatives(
        self,
        block: DraftBlock,
        token_id: int,
        candidates: Sequence[tuple[int, float]],
        is_guess: bool,
    ) -> float:
        """Those that are worth a row some day; the token's own chance, 1 where it is not known."""
        position, reach = len(block.token_ids), block.reach[-1]
        least = MIN_PROB / max(reach, MIN_PROB)  # the block itself may come true yet
        stands, num_before = 0.0 if candidates else 1.0, len(block.alternatives)
        for candidate, prob in candidates:
            if candidate == token_id:
                stands = prob
                if not is_guess:
                    continue
            if prob >= least and (is_guess or self._fan_out > 1):
                block.alternatives.append(Alternative(reach * prob, position, candidate))
        if len(block.alternatives) > num_before:
            block.alternatives.sort(reverse=True)
        return stands

    def open(self, block: DraftBlock, branch: Branch) -> DraftBlock:
        """Starts the child for the likeliest alternative, of which there must be one."""
        self._extensions = None
        prob, position, token_id = block.alternatives.pop(0)
        child = self._new_block(block.base_len + position + 1, self._ahead_gamma, branch)
        child.parent, child.position, child.next_token = block, position, token_id
        child.prob = block.prob * prob
        block.children[position, token_id] = child
        return child

    def extensions(self) -> list[Extension]:
        """What could be drafted ahead of the verdict, in no order."""
        if self._extensions is None:
            self._extensions = list(self._make_extensions())
        return self._extensions

    def _make_extensions(self) -> Iterator[Extension]:
        for block in self.blocks():
            may_extend = self.may_extend(block)
            if not block.is_complete and block is not self.root:
                yield Extension(block.prob, block, opens=False)
            if block.is_complete and not block.has_guess and may_extend:
                yield Extension(block.prob * block.reach[-1], block, opens=False)
            if self.may_open(block):
                yield Extension(block.prob * block.alternatives[0].prob, block, opens=True)

    def _new_block(self, base_len: int, gamma: int, branch: Branch) -> DraftBlock:
        self._num_blocks += 1
        room = len(self._buffer) - base_len
        return DraftBlock(self._num_blocks, base_len, min(gamma, room), branch)

    def assumed(self, block: DraftBlock) -> list[int]:
        """Tokens of the path that lie between what is committed and the block's own."""
        if block.base_len <= self.committed_len:
            return []
        start = self.committed_len
        return self.tokens(block, start)[: block.base_len - start]

    def give_up(self, block: DraftBlock) -> None:
        """No more alternatives of the block are opened."""
        block.alternatives.clear()
        self._extensions = None

    def prune(self) -> int:
        """Drops all that is drafted ahead, until the next commit; how many blocks."""
        num_dropped = sum(1 for _ in self.blocks()) - 1
        self.root.children.clear()
        self.root.alternatives.clear()
        self._extensions = None
        return num_dropped

    def commit(
        self, token_ids: Sequence[int], committed_len: int, gamma: int, ahead_gamma: int
    ) -> Walk:
        """Takes what was committed; the branch that foresaw it becomes the root, or a new block.

        Raises InvalidRequest if the lengths do not fit what is committed here.
        """
        if not token_ids or committed_len != self.committed_len + len(token_ids):
            raise InvalidRequest(
                "committed_len",
                f"{committed_len}; here it is {self.committed_len} + {len(token_ids)} tokens",
            )
        if committed_len > len(self._buffer):
            raise InvalidRequest("committed_len", f"{committed_len} exceeds max_len")
        self._extensions = None
        judged = self._judged(token_ids)
        block, position, num_matched = self._walk(token_ids)
        self._buffer[self.committed_len : committed_len] = token_ids
        num_right = self.committed_len + num_matched
        self.committed_len = committed_len
        self._gamma, self._ahead_gamma = gamma, ahead_gamma
        is_used_up = position >= block.gamma and gamma > 0
        if num_matched < len(token_ids) or is_used_up:
            self.root, self._num_root_tokens = self._fresh(block.branch), 0
            # The last token is run again at least: its logits draw the next one.
            return Walk(block, min(num_right, committed_len - 1), judged)
        self._take_root(block, position)
        return Walk(block, len(self._buffer), judged)

    def _judged(self, token_ids: Sequence[int]) -> list[tuple[float, bool]]:
        root, judged = self.root, []
        start = self._num_root_tokens
        drafts = root.token_ids[start : start + len(token_ids)]
        for index, (draft, token_id) in enumerate(zip(drafts, token_ids, strict=False), start):
            judged.append((root.reach[index + 1] / max(root.reach[index], 1e-9), draft == token_id))
            if draft != token_id:
                break
        return judged

    def _fresh(self, branch: Branch) -> DraftBlock:
        return self._new_block(self.committed_len, self._gamma, branch)

    def _walk(self, token_ids: Sequence[int]) -> tuple[DraftBlock, int, int]:
        """The block and position that the tokens lead to, and how many of them lead there."""
        block, position = self.root, self._num_root_tokens
        for num_matched, token_id in enumerate(token_ids):
            if position < len(block.token_ids) and block.token_ids[position] == token_id:
                position += 1
            elif (child := block.children.get((position, token_id))) is not None:
                block, position = child, 0
            else:
                return block, position, num_matched
        return block, position, len(token_ids)

    def _take_root(self, block: DraftBlock, position: int) -> None:
        """The block's first `position` tokens are committed; what contradicts them is dropped.

        That may complete it: what is wanted now may be less than was.
        """
        if not block.is_complete:
            num_wanted = max(position + self._gamma, len(block.token_ids))
            block.gamma = min(block.gamma, num_wanted)
        scale = block.prob * block.reach[position]
        block.alternatives = [
            Alternative(prob / max(block.reach[position], 1e-9), at, token_id)
            for prob, at, token_id in block.alternatives
            if at >= position
        ]
        block.children = {at: c for at, c in block.children.items() if at[0] >= position}
        for child in block.children.values():
            for below in child.descendants():
                below.prob /= max(scale, 1e-9)
        reach = max(block.reach[position], 1e-9)
        block.reach = [min(1.0, prob / reach) for prob in block.reach]
        block.prob = 1.0
        block.parent = None
        self.root, self._num_root_tokens = block, position
