"""Proposals and the committed tokens, compared with plain lists."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from orchestrator.speculation.verification import Proposal
from outrider.sampling.support import Support

TOKENS = st.integers(0, 2)
PATHS = st.lists(TOKENS, max_size=8)


def support(number: int) -> Support:
    """A distinct support for each position."""
    return Support(np.array([number], np.int64), np.ones(1))


@st.composite
def proposals(draw: st.DrawFn) -> tuple[Proposal, list[int]]:
    """A proposal, and the whole context with its draft tokens."""
    before = draw(st.lists(TOKENS, min_size=1, max_size=8))
    assumed, drafts = draw(PATHS), draw(st.lists(TOKENS, min_size=1, max_size=8))
    supports = None
    if draw(st.booleans()):
        supports = tuple(support(100 + i) for i in range(len(drafts)))
    base_len = len(before) + len(assumed)
    return Proposal(base_len, tuple(drafts), supports, tuple(assumed)), [*before, *assumed, *drafts]


@st.composite
def with_context(draw: st.DrawFn) -> tuple[Proposal, list[int], list[int]]:
    """Also a committed context, at least as long as the one at drafting."""
    proposal, path = draw(proposals())
    known_len = proposal.base_len - len(proposal.assumed_token_ids)
    if draw(st.booleans()):
        return proposal, path, path[: draw(st.integers(known_len, len(path)))]
    return proposal, path, [*path[:known_len], *draw(PATHS)]


@given(made=with_context())
def test_a_proposal_agrees_while_nothing_contradicts_it(
    made: tuple[Proposal, list[int], list[int]],
) -> None:
    """The committed context is a proper prefix of its path."""
    proposal, path, context = made
    expected = len(context) < len(path) and path[: len(context)] == context
    assert proposal.agrees(context) == expected


@given(made=with_context())
def test_the_rest_of_a_proposal_after_a_context(
    made: tuple[Proposal, list[int], list[int]],
) -> None:
    """The tokens of its path after the context, each with its support."""
    proposal, path, context = made
    if not proposal.agrees(context):
        return
    rest = proposal.continuing(len(context))
    if len(context) < proposal.base_len:
        assert rest is None, "assumed tokens are not committed yet"
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
    # The same in one step and token by token.
    assert proposal.continuing(len(path)) is None
    for end in range(len(context) + 1, len(path)):
        assert rest.continuing(end) == proposal.continuing(end)


@given(made=proposals(), num_tokens=st.integers(1, 10), skipped=st.integers(0, 7))
def test_the_head_has_the_first_tokens(
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
    # The order of cutting and skipping does not matter.
    rest = proposal.continuing(proposal.base_len + skipped)
    tail = head.continuing(proposal.base_len + skipped)
    if tail is not None:
        assert rest is not None
        assert tail == rest.head(num_tokens - skipped)
