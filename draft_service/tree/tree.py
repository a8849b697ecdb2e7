"""Speculation tree of one generation: blocks of draft tokens for possible verify results.

Pure state machine: no model, no randomness, no I/O. The root block continues the committed context
and is verified now or next. A child continues its parent's first `position` tokens and one more
that the target may emit there: a recovered token, or the bonus token after all of them. A commit
walks the tree along the committed tokens; blocks off that path are dropped.

Probabilities decide what is drafted first. They are products of the draft's estimates along the
path. Like Saguaro (arXiv 2603.03251), it drafts for several outcomes, fewer for less likely ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from draft_service.messages import SupportWeights, check_commit
from draft_service.tree.block import Alternative, DraftBlock, Extension
from draft_service.tree.kv_branches import Branch

# Less likely extensions are not drafted, not even on an idle device.
MIN_PROB = 0.005


class CommitOutcome(NamedTuple):
    """Result of a commit: the first `num_right` tokens of the KV branch of `source` are valid.

    `verified`: (predicted probability, whether it was accepted) of each verified draft token.
    """

    source: DraftBlock
    num_right: int
    verified: list[tuple[float, bool]]


class SpeculationTree:
    """Speculation tree of one generation.

    `buffer`: the generation's tokens, int64 [max_len], of which `committed_len` are committed.
    `gamma`: draft tokens wanted after the committed context; `ahead_gamma`: of each block drafted
    ahead. At most `lookahead` rounds ahead and `fan_out` outcomes per block. Unlikely blocks with
    supports are sent before a commit asks for them only if `tells_unlikely`.
    """

    def __init__(
        self,
        buffer: npt.NDArray[np.int64],
        committed_len: int,
        main_branch: Branch,
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
        # Tokens of the root that are committed.
        self._num_root_tokens = 0
        # Cache of `extensions`: most trees do not change in most steps.
        self._extensions: list[Extension] | None = None
        self.root = self._fresh(main_branch)

    @property
    def room_for_child(self) -> int:
        """Tokens that a new child adds to its KV branch: the token before it, and its own."""
        return self._ahead_gamma + 1

    @property
    def room_for_branch(self) -> int:
        """Tokens that a fork may grow by: a block per round ahead, and one after the last."""
        return self.room_for_child * self._lookahead + 1

    @property
    def is_needed(self) -> bool:
        """Whether the root is incomplete: the orchestrator waits for it, or soon will."""
        return not self.root.is_complete

    def blocks(self) -> Iterator[DraftBlock]:
        return self.root.descendants()

    def may_extend(self, block: DraftBlock) -> bool:
        """Whether children of the block may be drafted, within look-ahead, fan-out and room."""
        if self._ahead_gamma == 0 or len(block.children) >= self._fan_out:
            return False
        # There must be room for the token before the child, and for one of its own.
        return self._depth(block) < self._lookahead and block.end + 2 <= len(self._buffer)

    def may_open(self, block: DraftBlock) -> bool:
        """Whether an alternative of the block may be opened.

        One child is reserved for the guess, which is known last and is mostly the most likely one.
        """
        num_reserved = 0 if block.has_guess else 1
        is_full = len(block.children) + num_reserved >= self._fan_out
        return bool(block.alternatives) and not is_full and self.may_extend(block)

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
        """All tokens up to the block's end, for penalties; int64."""
        start = self.root.base_len
        return np.concatenate(
            (self._buffer[:start], np.asarray(self.tokens(block, start), np.int64))
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether anything but the root is drafted; otherwise candidates are not needed."""
        return self._lookahead > 0 and self._ahead_gamma > 0

    def add(
        self,
        block: DraftBlock,
        token_id: int,
        support: SupportWeights | None,
        candidates: Sequence[tuple[int, float]],
    ) -> bool:
        """Adds a sampled token: the block's next one or its guess. True if the block is to be sent.

        `candidates`: tokens that the target may emit there, with probabilities; may contain the
        token itself, and may be empty.
        """
        self._extensions = None
        is_guess = block.is_complete
        reach = block.reach[-1]
        prob = self._add_alternatives(block, token_id, candidates, is_guess)
        if is_guess:
            block.has_guess = True
            return False
        block.token_ids.append(token_id)
        block.reach.append(reach * prob)
        if support is not None:
            block.supports.append(support)
        return self._has_update(block)

    def updates(self) -> list[DraftBlock]:
        """Blocks to send after a commit; sampled before it, and not sent then."""
        return [block for block in self.blocks() if self._has_update(block)]

    def _has_update(self, block: DraftBlock) -> bool:
        if block is self.root:
            return self._gamma > 0 and block.is_complete and block.has_unsent
        is_ready = block.has_unsent and (block.is_complete or block.is_half)
        return is_ready and (self._tells_unlikely or block.is_likely)

    def _add_alternatives(
        self,
        block: DraftBlock,
        token_id: int,
        candidates: Sequence[tuple[int, float]],
        is_guess: bool,
    ) -> float:
        """Adds the candidates that are likely enough; the token's own probability, 1 if unknown."""
        position, reach = len(block.token_ids), block.reach[-1]
        least = MIN_PROB / max(reach, MIN_PROB)  # without `block.prob`, which may become 1
        own_prob, num_before = 0.0 if candidates else 1.0, len(block.alternatives)
        for candidate, prob in candidates:
            if candidate == token_id:
                own_prob = prob
                if not is_guess:
                    continue
            if prob >= least and (is_guess or self._fan_out > 1):
                block.alternatives.append(Alternative(reach * prob, position, candidate))
        if len(block.alternatives) > num_before:
            block.alternatives.sort(reverse=True)
        return own_prob

    def open(self, block: DraftBlock, branch: Branch) -> DraftBlock:
        """Opens the child for the block's most likely alternative; there must be one."""
        self._extensions = None
        prob, position, token_id = block.alternatives.pop(0)
        child = self._new_block(block.base_len + position + 1, self._ahead_gamma, branch)
        child.parent, child.position, child.next_token = block, position, token_id
        child.prob = block.prob * prob
        block.children[position, token_id] = child
        return child

    def extensions(self) -> list[Extension]:
        """Everything that may be drafted ahead, in no particular order."""
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
        """Tokens of the path between the committed ones and the block's own."""
        if block.base_len <= self.committed_len:
            return []
        start = self.committed_len
        return self.tokens(block, start)[: block.base_len - start]

    def give_up(self, block: DraftBlock) -> None:
        """Drops the block's alternatives; those of later tokens may still come."""
        block.alternatives.clear()
        self._extensions = None

    def prune(self) -> None:
        """Drops everything drafted ahead, until the next commit."""
        self.root.children.clear()
        self.root.alternatives.clear()
        self._extensions = None

    def commit(
        self, token_ids: Sequence[int], committed_len: int, gamma: int, ahead_gamma: int
    ) -> CommitOutcome:
        """Applies committed tokens. The block that they lead to becomes the root, or a new block.

        Raises InvalidRequest if the lengths do not match what is committed here.
        """
        check_commit(self.committed_len, token_ids, committed_len, len(self._buffer))
        self._extensions = None
        verified = self._verified(token_ids)
        block, position, num_matched = self._walk(token_ids)
        self._buffer[self.committed_len : committed_len] = token_ids
        num_right = self.committed_len + num_matched
        self.committed_len = committed_len
        self._gamma, self._ahead_gamma = gamma, ahead_gamma
        is_used_up = position >= block.gamma and gamma > 0
        if num_matched < len(token_ids) or is_used_up:
            self.root, self._num_root_tokens = self._fresh(block.branch), 0
            # At least the last token is run again: the next one is sampled from its logits.
            return CommitOutcome(block, min(num_right, committed_len - 1), verified)
        self._take_root(block, position)
        return CommitOutcome(block, len(self._buffer), verified)

    def _verified(self, token_ids: Sequence[int]) -> list[tuple[float, bool]]:
        root, verified = self.root, []
        start = self._num_root_tokens
        drafts = root.token_ids[start : start + len(token_ids)]
        for index, (draft, token_id) in enumerate(zip(drafts, token_ids, strict=False), start):
            prob = root.reach[index + 1] / max(root.reach[index], 1e-9)
            verified.append((prob, draft == token_id))
            if draft != token_id:
                break
        return verified

    def _fresh(self, branch: Branch) -> DraftBlock:
        return self._new_block(self.committed_len, self._gamma, branch)

    def _walk(self, token_ids: Sequence[int]) -> tuple[DraftBlock, int, int]:
        """(block, position) that the tokens lead to, and the number of tokens on that path."""
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
        """Makes the block the root: its first `position` tokens are committed.

        Drops what contradicts them. The block may become complete: γ may be smaller than before.
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
