"""Speculation tree against a model of it: any samples, openings, commits and limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from outrider.errors import InvalidRequest
from tests.draft_service.tree_play import Limits, Play

numbers = st.integers(0, 4)
rounds = st.lists(
    st.tuples(st.integers(0, 60), st.floats(0, 1), st.integers(0, 2), numbers, numbers),
    min_size=1,
    max_size=10,
)


@pytest.mark.slow
def test_any_play() -> None:
    """Rounds of drafting and committing, of all kinds."""
    seen = Counter[str]()

    @settings(max_examples=300, deadline=None)
    @given(
        limits=st.builds(
            Limits, st.integers(1, 3), st.integers(2, 40), *[numbers] * 4, *[st.booleans()] * 2
        ),
        seed=st.integers(0, 2**32),
        rounds=rounds,
    )
    def play(limits: Limits, seed: int, rounds: list[tuple[int, float, int, int, int]]) -> None:
        made = Play(limits, seed)
        for num_actions, share, num_other, gamma, ahead_gamma in rounds:
            made.draft(num_actions)
            made.contradict(1 + num_actions)
            made.commit_along(share, num_other, gamma, ahead_gamma)
        seen.update(made.seen)

    play()
    assert min(seen.values()) > 30, seen
    assert len(seen) == 4, seen


LONG = Limits(prompt_len=2, room=20, gamma=3, ahead_gamma=2, lookahead=2, fan_out=4)


@pytest.mark.slow
def test_unlikely_blocks_are_sent_late() -> None:
    """With supports: after a commit that leads to them, or makes them likely."""
    num_sent_late = 0
    for seed in range(20):
        made = Play(replace(LONG, lookahead=4, has_supports=True), seed)
        for _ in range(3):
            made.draft(100)
            made.commit_along(share=0.6, num_other=0, gamma=3, ahead_gamma=2)
        num_sent_late += made.num_sent_late
    assert num_sent_late > 30


def test_giving_up_and_pruning() -> None:
    """Without room for forks nothing more is opened; pruned blocks are not drafted again."""
    made = Play(LONG)
    made.draft(12)
    made.tree.give_up(made.tree.root)
    assert made.tree.root not in made.openable()
    num_ahead = len(list(made.tree.blocks())) - 1
    assert num_ahead > 0
    made.tree.prune()
    assert list(made.tree.blocks()) == [made.tree.root]
    made.draft(12)
    assert made.tree.root.is_complete, "the needed block is drafted all the same"
    made.commit_along(1.0, 1, 2, 2)
    made.draft(12)
    assert len(list(made.tree.blocks())) > 1


def test_blocks_shrink_to_the_room_that_is_left() -> None:
    """The commit that fills the buffer is accepted; one more token is an error."""
    made = Play(LONG)
    while made.room() > 1:
        made.draft(20)
        made.commit([0], 4, 4)
    made.commit([0], 4, 4)
    assert not made.tree.is_needed
    assert not made.tree.extensions()
    with pytest.raises(InvalidRequest, match="max_len"):
        made.tree.commit([0], len(made.committed) + 1, 2, 2)


def test_blocks_drafted_without_look_ahead_can_be_continued() -> None:
    """Regression: tokens without a predicted probability counted as impossible."""
    limits = Limits(prompt_len=2, room=40, gamma=3, ahead_gamma=0, lookahead=1, fan_out=4)
    made = Play(limits)
    made.draft(4)
    assert not made.drawable()
    walk = made.tree.commit(made.drawn[made.tree.root][:1], 3, 3, 3)
    assert walk.verified == [(1, True)]
    (guess,) = made.drawable()
    assert guess is made.tree.root
    assert made.tree.extensions()[0].prob == 1
