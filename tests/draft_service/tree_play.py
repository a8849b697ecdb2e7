"""Plays with a speculation tree: samples, openings and commits, checked against a model of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from draft_service.messages import SupportWeights
from draft_service.tree.block import DraftBlock
from draft_service.tree.kv_branches import Branch
from draft_service.tree.tree import SpeculationTree
from outrider.engine import KVStore
from outrider.errors import InvalidRequest

VOCAB_SIZE = 3  # small, so that guesses are often right by chance
LIMIT = 1 + 1e-6
SUPPORT = SupportWeights(np.arange(VOCAB_SIZE), np.full(VOCAB_SIZE, 1 / 3, np.float32))


def near(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return same


@dataclass
class Limits:
    prompt_len: int
    room: int
    gamma: int
    ahead_gamma: int
    lookahead: int
    fan_out: int
    has_supports: bool = False
    tells_unlikely: bool = False


class Play:
    """Plays the draft model, the KV branches, and the orchestrator that commits.

    `before[block]`: the tokens its path must have before its own; `drawn[block]`: its own.
    """

    def __init__(self, limits: Limits, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.seen = Counter[str]()
        self.num_sent_late = 0
        self.committed: list[int] = self.tokens(limits.prompt_len)
        self.buffer = np.full(limits.prompt_len + limits.room, -1, np.int64)
        self.buffer[: limits.prompt_len] = self.committed
        self.gamma, self.ahead_gamma = limits.gamma, limits.ahead_gamma
        self.lookahead, self.fan_out = limits.lookahead, limits.fan_out
        self.support = SUPPORT if limits.has_supports else None
        self.sends_all = limits.tells_unlikely or not limits.has_supports
        self.tree = SpeculationTree(
            self.buffer,
            limits.prompt_len,
            Branch(KVStore([], 1).open(1)),
            gamma=limits.gamma,
            ahead_gamma=limits.ahead_gamma,
            lookahead=limits.lookahead,
            fan_out=limits.fan_out,
            tells_unlikely=limits.tells_unlikely,
        )
        self.before = {self.tree.root: list(self.committed)}
        self.drawn: dict[DraftBlock, list[int]] = {self.tree.root: []}
        self.check_fresh()

    def tokens(self, count: int) -> list[int]:
        drawn: list[int] = self.rng.integers(VOCAB_SIZE, size=count).tolist()
        return drawn

    def room(self) -> int:
        return len(self.buffer) - len(self.committed)

    def check_fresh(self) -> None:
        root = self.tree.root
        assert (root.base_len, root.token_ids) == (len(self.committed), [])
        assert root.gamma == min(self.gamma, self.room()), "as many as are asked for and fit"
        assert (root.children, root.alternatives, root.has_guess) == ({}, [], False)
        assert list(self.tree.blocks()) == [root]

    def drawable(self) -> list[DraftBlock]:
        waited = [self.tree.root] if self.tree.is_needed else []
        return waited + [o.block for o in self.tree.extensions() if not o.opens]

    def openable(self) -> list[DraftBlock]:
        return [o.block for o in self.tree.extensions() if o.opens]

    def draft(self, num_actions: int) -> None:
        for _ in range(num_actions):
            drawable, openable = self.drawable(), self.openable()
            if openable and (not drawable or self.rng.random() < 0.4):
                self.open(openable[self.rng.integers(len(openable))])
            elif drawable:
                self.draw(drawable[self.rng.integers(len(drawable))])
            self.check()

    def draw(self, block: DraftBlock) -> None:
        candidates = self.rng.permutation(VOCAB_SIZE)[: self.rng.integers(1, 4)].tolist()
        weights = np.sort(self.rng.random(len(candidates)))[::-1]
        probs = (weights / max(1.0, weights.sum())).tolist()
        token, position = candidates[0], block.end
        if not self.tree.looks_ahead:  # then there are none
            probs = []
        was_complete, had_guess = block.is_complete, block.has_guess
        pairs = list(zip(candidates, probs, strict=False))
        is_sent = self.tree.add(block, token, self.support, pairs)
        if was_complete:
            assert (had_guess, block.has_guess, is_sent) == (False, True, False), "one guess"
            return
        self.drawn[block] = [*self.drawn[block], token]
        assert is_sent == self.is_due(block)
        if is_sent:
            self.send([block])
        assert self.tree.tokens(block, position) == [token]

    def is_due(self, block: DraftBlock) -> bool:
        """Whether it is to be sent: whole or half, with supports mostly only if it is likely."""
        count, is_ahead = len(self.drawn[block]), block is not self.tree.root
        is_whole = count == block.gamma
        is_half = is_ahead and block.gamma > 2 and count == (block.gamma + 1) // 2
        is_likely = block.prob >= (0.02 if is_whole else 0.1)
        return (is_whole or is_half) and (is_likely or self.sends_all or not is_ahead)

    def send(self, blocks: Sequence[DraftBlock]) -> None:
        for block in blocks:
            block.num_sent = len(block.token_ids)

    def open(self, parent: DraftBlock) -> None:
        best, branch = parent.alternatives[0], Branch(self.tree.root.branch.sequence)
        child = self.tree.open(parent, branch)
        assert child.branch is branch
        assert best not in parent.alternatives
        assert all(rest.prob <= best.prob for rest in parent.alternatives)
        own = self.drawn[parent]
        assert best.position <= len(own)
        assert best.token_id != [*own, -1][best.position], "that is the block's own token"
        self.before[child] = [*self.before[parent], *own[: best.position], best.token_id]
        self.drawn[child] = []
        assert child.base_len == len(self.before[child])
        assert child.gamma == min(self.ahead_gamma, len(self.buffer) - child.base_len) >= 1
        assert child.prob == pytest.approx(parent.prob * best.prob)

    def commit_along(self, share: float, num_other: int, gamma: int, ahead_gamma: int) -> None:
        """Commits a share of a path of the tree, then any tokens: hits, tails, misses."""
        blocks = list(self.tree.blocks())
        path = self.path(blocks[self.rng.integers(len(blocks))])[len(self.committed) :]
        new = (path[: round(share * len(path))] + self.tokens(num_other))[: self.room()]
        if new:
            self.commit(new, gamma, ahead_gamma)
            self.check()

    def commit(self, new: list[int], gamma: int, ahead_gamma: int) -> None:
        former = list(self.tree.blocks())
        root, num_known = self.tree.root, len(self.committed)
        self.committed += new
        self.gamma, self.ahead_gamma = gamma, ahead_gamma
        found = [block for block in former if self.leads_to(block)]
        assert len(found) <= 1, "each path exists once"
        was_complete = found != [] and found[0].is_complete
        walk = self.tree.commit(new, len(self.committed), gamma, ahead_gamma)
        self.check_verified(walk.verified, root, new, num_known)
        assert walk.source in former
        held = near(self.committed, self.path(walk.source))
        assert held == max(near(self.committed, self.path(block)) for block in former)
        if found and (gamma == 0 or self.num_committed_of(found[0]) < found[0].gamma):
            self.seen["the same root" if found[0] is root else "foreseen"] += 1
            assert self.tree.root is walk.source is found[0]
            left = set(self.tree.blocks())
            assert left == {block for block in former if self.agrees(block, found[0])}
            self.seen["with branches"] += len(left) > 1
            assert walk.num_right >= len(self.path(found[0]))
            if not was_complete:  # no more than is asked for
                most = max(self.num_committed_of(found[0]) + gamma, len(self.drawn[found[0]]))
                assert self.tree.root.gamma <= most
        else:
            self.seen["missed"] += 1
            self.before[self.tree.root] = list(self.committed)
            self.drawn[self.tree.root] = []
            self.check_fresh()
            assert walk.num_right == min(held, len(self.committed) - 1)
        self.check_updates()

    def check_updates(self) -> None:
        """`updates` are the blocks that the commit made likely or complete, or that it asks for."""
        blocks = list(self.tree.blocks()) if self.gamma else list(self.tree.blocks())[1:]
        due = [b for b in blocks if self.is_due(b) and b.num_sent < len(self.drawn[b])]
        assert self.tree.updates() == due
        self.num_sent_late += len(due)
        self.send(due)
        assert self.tree.updates() == []

    def check_verified(
        self, verified: list[tuple[float, bool]], root: DraftBlock, new: list[int], num_known: int
    ) -> None:
        """The root's verified tokens: those accepted, and the rejected one."""
        drafts = self.path(root)[num_known:]
        num_accepted = near(drafts, new)
        is_rejected = num_accepted < min(len(drafts), len(new))
        expected = [True] * num_accepted + [False] * is_rejected
        assert [is_accepted for _, is_accepted in verified] == expected
        assert all(0 <= prob <= LIMIT for prob, _ in verified)

    def path(self, block: DraftBlock) -> list[int]:
        return [*self.before[block], *self.drawn[block]]

    def num_committed_of(self, block: DraftBlock) -> int:
        return len(self.committed) - len(self.before[block])

    def leads_to(self, block: DraftBlock) -> bool:
        """Whether the committed tokens end within the block or at its end."""
        path = self.path(block)[: len(self.committed)]
        return self.num_committed_of(block) >= 0 and path == self.committed

    def agrees(self, block: DraftBlock, root: DraftBlock) -> bool:
        """Whether the block is the root or agrees with the committed tokens below it."""
        before = self.before[block]
        return block is root or (
            before[: len(self.before[root])] == self.before[root]
            and len(before) > len(self.committed)
            and before[: len(self.committed)] == self.committed
        )

    def check(self) -> None:
        known = len(self.committed)
        assert self.tree.committed_len == known
        assert self.buffer[:known].tolist() == self.committed
        assert self.tree.is_needed == (not self.tree.root.is_complete)
        for block in self.tree.blocks():
            self.check_tokens(block)
            self.check_limits(block)
        for extension in self.tree.extensions():
            assert 0 <= extension.prob <= LIMIT
            assert extension.opens or not (
                extension.block.has_guess and extension.block.is_complete
            )

    def check_tokens(self, block: DraftBlock) -> None:
        path, known = self.path(block), len(self.committed)
        assert block.token_ids == self.drawn[block], "a block's tokens do not change"
        assert path[:known] == self.committed[: len(path)]
        assert block.end == len(path) <= len(self.buffer)
        for start in range(len(path) + 1):
            assert self.tree.tokens(block, start) == path[start:]
        assert self.tree.context(block).tolist() == path
        assert self.tree.assumed(block) == self.before[block][known:]

    def check_limits(self, block: DraftBlock) -> None:
        above, depth = block, 0
        while above is not self.tree.root:
            assert above.parent is not None
            above, depth = above.parent, depth + 1
        assert depth <= self.lookahead
        assert len(block.children) <= self.fan_out
        if self.fan_out == 1:
            assert all(p == len(self.drawn[block]) for p, _ in block.children), "a chain"
        for place, child in block.children.items():
            assert child.parent is block
            assert place == (child.position, child.next_token)
        assert len(block.reach) == len(block.token_ids) + 1
        assert 0 <= block.prob <= LIMIT
        assert all(0 <= reach <= LIMIT for reach in block.reach)
        assert all(0 <= other.prob <= LIMIT for other in block.alternatives)

    def contradict(self, shift: int) -> None:
        """A commit of another length is refused and changes nothing."""
        blocks, known = list(self.tree.blocks()), self.buffer.tolist()
        for new, length in (
            ([], len(self.committed)),
            ([0], len(self.committed) + 1 + shift),
            ([0] * (self.room() + 1), len(self.buffer) + 1),
        ):
            with pytest.raises(InvalidRequest, match="committed_len"):
                self.tree.commit(new, length, 2, 2)
        assert list(self.tree.blocks()) == blocks
        assert self.buffer.tolist() == known
