"""Which proposals go on from what is committed, and with what: against a model of plain lists."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from orchestrator.speculation.verification import Proposal
from outrider.sampling.support import Support

TOKENS = st.integers(0, 2)
PATHS = st.lists(TOKENS, max_size=8)


def support(number: int) -> Support:
    """One of its own for each position."""
    return Support(np.array([number], np.int64), np.ones(1))


@st.composite
def proposals(draw: st.DrawFn) -> tuple[Proposal, list[int]]:
    """With the whole context and draft tokens that it stands for."""
    before = draw(st.lists(TOKENS, min_size=1, max_size=8))
    assumed, drafts = draw(PATHS), draw(st.lists(TOKENS, min_size=1, max_size=8))
    supports = None
    if draw(st.booleans()):
        supports = tuple(support(100 + i) for i in range(len(drafts)))
    base_len = len(before) + len(assumed)
    return Proposal(base_len, tuple(drafts), supports, tuple(assumed)), [*before, *assumed, *drafts]


@st.composite
def with_context(draw: st.DrawFn) -> tuple[Proposal, list[int], list[int]]:
    """And a committed context, no shorter than what the draft had been told."""
    proposal, path = draw(proposals())
    told = proposal.base_len - len(proposal.assumed_token_ids)
    if draw(st.booleans()):
        return proposal, path, path[: draw(st.integers(told, len(path)))]
    return proposal, path, [*path[:told], *draw(PATHS)]


@given(made=with_context())
def test_a_proposal_agrees_while_nothing_contradicts_it(
    made: tuple[Proposal, list[int], list[int]],
) -> None:
    """What is committed is a beginning of its path, and not all of it."""
    proposal, path, context = made
    expected = len(context) < len(path) and path[: len(context)] == context
    assert proposal.agrees(context) == expected


@given(made=with_context())
def test_what_it_proposes_after_a_context(made: tuple[Proposal, list[int], list[int]]) -> None:
    """The tokens of its path behind the context, each with the support it was drawn from."""
    proposal, path, context = made
    if not proposal.agrees(context):
        return
    rest = proposal.continuing(len(context))
    if len(context) < proposal.base_len:
        assert rest is None, "it has still to be seen whether what it assumes comes"
        return
    assert rest is not None
    assert context + list(rest.token_ids) == path
    assert rest.base_len == len(context)
    assert rest.assumed_token_ids == ()
    assert rest.agrees(context)
    assert rest.continuing(len(context)) == rest
    if proposal.supports is None:
        assert rest.supports is None
    else:
        assert rest.supports == proposal.supports[-len(rest.token_ids) :]
    # In one step or token by token: the same.
    assert proposal.continuing(len(path)) is None
    for end in range(len(context) + 1, len(path)):
        assert rest.continuing(end) == proposal.continuing(end)


@given(made=proposals(), num_tokens=st.integers(1, 10), skipped=st.integers(0, 7))
def test_the_head_is_the_same_with_fewer_tokens(
    made: tuple[Proposal, list[int]], num_tokens: int, skipped: int
) -> None:
    proposal, path = made
    whole = proposal.continuing(proposal.base_len)
    assert whole is not None
    head = whole.head(num_tokens)
    assert head.token_ids == proposal.token_ids[:num_tokens]
    assert head.base_len == proposal.base_len
    if proposal.supports is not None:
        assert head.supports == proposal.supports[:num_tokens]
    assert head.head(num_tokens) == head
    assert head.agrees(path[: proposal.base_len])
    # Cut and then skipped, or skipped and then cut.
    rest = proposal.continuing(proposal.base_len + skipped)
    tail = head.continuing(proposal.base_len + skipped)
    if tail is not None:
        assert rest is not None
        assert tail == rest.head(num_tokens - skipped)
