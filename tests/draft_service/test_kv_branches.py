"""KV branches on a real engine: the KV is right whatever is forked, committed or pruned.

Each branch is compared with an engine of its own that runs the branch's tokens and nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from draft_service.messages import Commit, OpenDraft, TargetIdentity
from draft_service.tree.block import DraftBlock, Extension
from draft_service.tree.draft_session import DraftGeneration, DraftRow, DraftSession
from draft_service.tree.targets import ServedTarget
from outrider.engine import Append, EngineOptions, Sequence, load_engine
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import SessionTable
from outrider.sampling.params import SamplingParams, Verification
from tests.services.parts import Pair

VOCAB_SIZE = 256
MAX_GAMMA = 5
MAX_LEN = 120
TOLERANCE = 1e-4
KEY = GenerationKey(1, 1)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
gammas = st.integers(0, MAX_GAMMA)


class Engines:
    """The engine under test, and one without forks."""

    def __init__(self, directory: Path) -> None:
        options = EngineOptions(str(directory), dtype="float32", kv_cache_tokens=2048)
        self.tested, self.plain = load_engine(options), load_engine(options)

    def check(self, held: dict[Sequence, list[int]]) -> None:
        """Checks that every sequence continues like one that ran these tokens from the start."""
        store, probe = self.tested.store, 7
        store.check_integrity()
        forks, fresh = [], []
        for sequence, token_ids in held.items():
            # A fork of it, so that it stays as it is.
            forks.append(store.fork(sequence, len(token_ids) + 1, length=len(token_ids)))
            fresh.append(self.plain.store.open(len(token_ids) + 1))
        got = self.tested.forward([Append(fork, [probe], 1) for fork in forks])
        expected = self.plain.forward(
            [Append(s, [*ids, probe], 1) for s, ids in zip(fresh, held.values(), strict=True)]
        )
        for fork, plain in zip(forks, fresh, strict=True):
            store.free(fork)
            self.plain.store.free(plain)
        assert not held or float((got - expected).abs().max()) < TOLERANCE


@dataclass
class Play:
    """A generation with random tokens and openings; `num_taken` tokens of KV are used elsewhere."""

    engines: Engines
    prompt_len: int
    gamma: int
    ahead_gamma: int
    lookahead: int
    fan_out: int
    seed: int = 0
    num_taken: int = 0

    def __post_init__(self) -> None:
        self.engine = self.engines.tested
        store = self.engine.store
        self.prob = np.random.default_rng(self.seed)
        self.num_full = 0
        ids = self.prob.integers(VOCAB_SIZE, size=self.prompt_len)
        sampler = self.engine.sampler(SAMPLING, self.prompt_len, VOCAB_SIZE)
        target = ServedTarget(TargetIdentity())
        state = DraftGeneration(
            KEY, sampler, Verification.REJECTION, VOCAB_SIZE, target, self.prompt_len
        )
        self.table: SessionTable[DraftGeneration] = SessionTable(store, 60.0)
        self.live = self.table.open("s", 1, None, MAX_LEN, (0, 0.0), state)
        self.live.token_ids[: self.prompt_len] = ids
        command = OpenDraft(
            KEY, "s", 1, ids, self.prompt_len, MAX_LEN, SAMPLING, Verification.REJECTION,
            self.gamma, self.ahead_gamma, self.lookahead, self.fan_out, VOCAB_SIZE,
        )  # fmt: skip
        self.drafting = DraftSession(store, self.live, command)
        self.tree = self.drafting.tree
        # What is left of the memory is a page or so, or plenty.
        self.taken = store.open(self.num_taken) if self.num_taken else None

    def rows(self) -> list[DraftBlock]:
        waited = [self.tree.root] if self.tree.is_needed else []
        return waited + [o.block for o in self.tree.extensions() if not o.opens]

    def step(self, blocks: list[DraftBlock]) -> None:
        """Samples a token for each block that has room, in one pass."""
        blocks = [block for block in blocks if self.drafting.has_room(block)]
        rows = [DraftRow(self.drafting, block) for block in blocks]
        assert all(row.num_pending >= 1 for row in rows), "there is something to run"
        self.engine.forward([row.append(row.num_pending, VOCAB_SIZE) for row in rows])
        for block in blocks:
            ids = self.prob.choice(VOCAB_SIZE, size=4, replace=False).tolist()
            self.tree.add(block, ids[0], None, list(zip(ids, (0.4, 0.3, 0.1, 0.1), strict=True)))

    def open(self, extension: Extension) -> None:
        used = self.engine.store.used_tokens
        if self.drafting.opened(extension) is None:
            self.num_full += 1
            assert self.taken is not None, "there was room"
            assert self.engine.store.used_tokens == used

    def draft(self, num_actions: int) -> None:
        """Runs some of the rows and opens some of the alternatives."""
        for _ in range(num_actions):
            rows, openings = self.rows(), [o for o in self.tree.extensions() if o.opens]
            if openings and (not rows or self.prob.random() < 0.5):
                self.open(openings[self.prob.integers(len(openings))])
            elif rows:
                count = int(self.prob.integers(1, len(rows) + 1))
                self.step([rows[i] for i in self.prob.permutation(len(rows))[:count]])

    def commit(self, share: float, num_other: int, gamma: int, ahead_gamma: int) -> None:
        """Commits a share of a path of the tree, then random tokens."""
        blocks = list(self.tree.blocks())
        path = self.tree.tokens(blocks[self.prob.integers(len(blocks))], self.tree.committed_len)
        others = self.prob.integers(VOCAB_SIZE, size=num_other).tolist()
        new = path[: round(share * len(path))] + others
        new = new[: MAX_LEN - self.tree.committed_len]
        if new:
            length = self.tree.committed_len + len(new)
            self.drafting.commit(Commit(KEY, new, length, gamma, ahead_gamma))
            self.check()

    def check(self) -> None:
        store, main = self.engine.store, self.live.sequence
        assert self.tree.root.branch.sequence is main, "the root is on the main branch"
        is_run = main.run_start is not None or not main.length
        assert is_run or self.taken is not None, "in place"
        paths: dict[Sequence, list[int]] = {}
        for block in self.tree.blocks():
            path = self.tree.tokens(block, 0)
            if len(path) > len(paths.get(block.branch.sequence, [])):
                paths[block.branch.sequence] = path
        is_taken = self.taken is not None
        assert store.num_sequences == len(paths) + is_taken, "one per branch, none leaked"
        if self.taken is not None:  # else there may be no room for the forks of the check
            store.free(self.taken)
        self.engines.check({s: path[: s.length] for s, path in paths.items() if s.length})
        if self.taken is not None:
            self.taken = store.open(self.num_taken)

    def end(self) -> None:
        self.check()
        self.drafting.end()
        assert self.live.sequence.length <= self.tree.committed_len
        self.table.close(self.live, keep=False)
        if self.taken is not None:
            self.engine.store.free(self.taken)
        assert self.engine.store.used_tokens == 0


rounds = st.lists(
    st.tuples(st.integers(0, 30), st.floats(0, 1), st.integers(0, 2), gammas, gammas),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@pytest.mark.parametrize("num_taken", [0, 1840])
def test_every_branch_has_the_kv_of_its_own_tokens(num_taken: int, pair: Pair) -> None:
    """For any drafts and commits. With little memory there are fewer branches."""
    engines = Engines(pair.draft)
    seen = Counter[str]()

    # Which examples come depends on the modules that are loaded: enough for the least below.
    @settings(max_examples=200, deadline=None)
    @given(
        prompt_len=st.integers(1, 40),
        gammas=st.tuples(gammas, gammas),
        lookahead=st.integers(1, 3),
        fan_out=st.integers(1, 5),
        seed=st.integers(0, 2**32),
        rounds=rounds,
    )
    def play(
        prompt_len: int,
        gammas: tuple[int, int],
        lookahead: int,
        fan_out: int,
        seed: int,
        rounds: list[tuple[int, float, int, int, int]],
    ) -> None:
        made = Play(engines, prompt_len, *gammas, lookahead, fan_out, seed, num_taken)
        for num_actions, share, num_other, gamma, ahead_gamma in rounds:
            made.draft(num_actions)
            if seed % 5 == 0 and share < 0.2:
                made.drafting.prune()
            seen["branches"] += len(list(made.tree.blocks())) > 2
            root = made.tree.root
            made.commit(share, num_other, gamma, ahead_gamma)
            seen["foreseen"] += made.tree.root.token_ids != [] and made.tree.root is not root
        seen["full"] += made.num_full
        made.end()

    play()
    assert min(seen["branches"], seen["foreseen"]) >= 10, seen
    assert (seen["full"] > 0) == (num_taken > 0), seen


def test_a_branch_has_room_for_blocks_that_became_longer(pair: Pair) -> None:
    """Regression: a longer block continued a branch beyond the room it was forked with."""
    made = Play(Engines(pair.draft), 4, 3, 1, 2, 4)
    drafting, tree = made.drafting, made.tree
    for _ in range(3):
        made.step(made.rows())
    for _ in range(2):
        made.open(Extension(1.0, tree.root, opens=True))
    branch = next(child for (at, _), child in tree.root.children.items() if at >= 1)
    drafting.commit(Commit(KEY, tree.root.token_ids[:1], tree.committed_len + 1, 2, MAX_GAMMA))
    for _ in range(2):  # its only token, then the guess after it
        made.step(made.rows())
    while branch.alternatives and tree.may_extend(branch):
        made.open(Extension(1.0, branch, opens=True))
    assert {child.gamma for child in branch.children.values()} == {MAX_GAMMA}
    while rows := made.rows():
        made.step(rows)
    made.end()


def test_a_branch_is_cut_if_there_is_no_room_to_copy_it_into_the_main_branch(pair: Pair) -> None:
    """The tokens without room are run again; the KV is right before and after that."""
    made = Play(Engines(pair.draft), 10, 2, 8, 1, 4)
    tree, store = made.tree, made.engine.store
    for _ in range(2):
        made.step([tree.root])
    made.open(Extension(1.0, tree.root, opens=True))
    (child,) = tree.root.children.values()
    for _ in range(8):
        made.step([child])
    assert child.branch is not tree.root.branch
    path = tree.tokens(child, tree.committed_len)
    made.num_taken = store.capacity_tokens - store.used_tokens
    made.taken = store.open(made.num_taken)
    made.drafting.commit(Commit(KEY, path[:-2], tree.committed_len + len(path) - 2, 2, 8))
    assert tree.root is child
    assert made.live.sequence.length == 11 < child.end - 1, "what it had room for"
    made.check()
    made.step([child])
    assert made.live.sequence.length == child.end
    made.end()
