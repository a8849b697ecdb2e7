"""Prompt lookup: what is proposed, what is observed, and that its memory and time are bounded."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.speculation.acceptance import MatchAcceptance
from orchestrator.speculation.lookup import LookupDrafts, PromptLookup
from outrider.sampling.params import SamplingParams, Verification
from tests.orchestrator.replicas.requests import draft_request


def looked_up(context: list[int], num_tokens: int) -> tuple[int, ...]:
    lookup = PromptLookup(context, len(context))
    while lookup.num_indexed < len(context):
        lookup.update()
    return lookup.propose(num_tokens)


def test_the_tokens_after_the_earlier_occurrence_are_proposed() -> None:
    assert looked_up([5, 6, 7, 8, 9, 1, 5, 6], 3) == (7, 8, 9)


def test_nothing_is_proposed_for_a_pair_that_did_not_occur() -> None:
    assert looked_up([5, 6, 7, 8, 5, 7], 3) == ()
    assert looked_up([5, 5], 3) == ()
    assert looked_up([5], 3) == ()


def test_the_longest_match_is_taken_before_a_later_one() -> None:
    assert looked_up([1, 2, 3, 4, 0, 9, 2, 3, 7, 0, 1, 2, 3], 1) == (4,)


def test_of_equal_matches_the_last_is_taken() -> None:
    assert looked_up([2, 3, 4, 0, 2, 3, 7, 0, 2, 3], 1) == (7,)


def test_a_copy_that_reaches_the_end_goes_on_with_its_own_tokens() -> None:
    assert looked_up([9, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_a_proposal_follows_an_earlier_occurrence_of_the_last_two_tokens(
    context: list[int], num_tokens: int
) -> None:
    found = looked_up(context, num_tokens)
    pairs = list(pairwise(context))
    assert bool(found) == (len(context) > 2 and pairs[-1] in pairs[:-1])
    if not found:
        return
    assert len(found) == num_tokens
    text = (*context, *found)
    begins = [i for i in range(2, len(context)) if context[i - 2 : i] == context[-2:]]
    assert any(text[i : i + num_tokens] == found for i in begins)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.data())
def test_the_order_of_updates_changes_nothing_of_what_is_indexed(
    context: list[int], data: st.DataObject
) -> None:
    """A context that grows by parts gives a match as long as the same context at once."""
    growing = context[: data.draw(st.integers(0, len(context)))]
    lookup = PromptLookup(growing, len(context))
    lookup.update()
    growing += context[len(growing) :]
    lookup.update()
    assert bool(lookup.propose(1)) == bool(looked_up(context, 1))


def test_every_token_that_could_have_been_proposed_is_observed() -> None:
    """Whether or not it was used: acceptance is measured in rounds without lookup, too."""
    context, seen = [1, 2, 3, 4, 5, 0, 1, 2], []
    lookup = PromptLookup(context, 100, lambda *observed: seen.append(observed))
    lookup.update()
    context += [3, 4, 9, 9]
    lookup.update()
    assert seen == [(2, True), (3, True), (4, False)]


def test_a_long_context_is_indexed_in_parts() -> None:
    """So that an update never takes long; until all is indexed, nothing is proposed."""
    context = [*range(20_000), 7, 8]
    lookup = PromptLookup(context, len(context))
    num_indexed = []
    while lookup.num_indexed < len(context):
        assert lookup.propose(1) == ()
        lookup.update()
        num_indexed.append(lookup.num_indexed)
    assert len(num_indexed) == 3
    assert lookup.propose(2) == (9, 10)


def test_acceptance_is_learnt_by_match_length() -> None:
    model = MatchAcceptance()
    for _ in range(200):
        model.observe(2, False)
        model.observe(20, True)
    assert model.survival(2, 1)[0] < 0.1
    assert model.survival(20, 1)[0] > 0.9


def test_a_generation_begins_with_the_acceptance_of_all() -> None:
    shared = MatchAcceptance()
    other = MatchAcceptance(shared)
    for _ in range(200):
        other.observe(2, False)
    assert MatchAcceptance(shared).survival(2, 1)[0] < 0.1


def test_survival_of_later_tokens_is_that_of_longer_matches() -> None:
    model = MatchAcceptance()
    rates = model.rates()
    assert model.survival(2, 3) == pytest.approx(
        [rates[0], rates[0] * rates[1], rates[0] * rates[1] ** 2]
    )


@pytest.mark.parametrize(
    ("temperature", "verification", "has_supports"),
    [
        (1.0, Verification.REJECTION, True),
        (1.0, Verification.BLOCK, True),
        (1.0, Verification.COUPLED, False),
        (0.0, Verification.REJECTION, False),
    ],
)
def test_a_proposed_token_has_probability_1(
    temperature: float, verification: Verification, has_supports: bool
) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=10)
    request = replace(draft_request([1, 2, 3, 1, 2]), params=params, verification=verification)
    source = LookupDrafts(request, MatchAcceptance())
    source.open(2, 0)
    proposal = source.propose()
    assert proposal is not None
    assert proposal.token_ids == (3, 1)
    assert proposal.base_len == 5
    assert (proposal.supports is not None) == has_supports
    for token_id, support in zip(proposal.token_ids, proposal.supports or (), strict=False):
        assert support.token_ids.tolist() == [token_id]
        assert np.array_equal(support.probs, [1.0])
