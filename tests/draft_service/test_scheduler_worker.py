"""The draft worker, a pass at a time: order of service, drafting ahead, KV room, bad input."""

from __future__ import annotations

from typing import Any

import pytest

from draft_service.messages import Commit, Proposed
from outrider.engine import Engine
from outrider.model_server.messages import Failure, FailureReason
from tests.draft_service.draft_worker import KV_TOKENS, PROMPT, Draft, key, opening
from tests.services.noting import Clock, Fed
from tests.services.parts import Greedy


def path(proposal: Proposed) -> list[int]:
    return [*proposal.assumed_token_ids, *proposal.token_ids]


def positions(passes: list[list[Fed]]) -> list[int]:
    return [fed.start + i for parts in passes for fed in parts for i in range(len(fed.token_ids))]


def test_several_outcomes_are_drafted_ahead(draft: Draft, truth: Greedy) -> None:
    """Each block is the draft's greedy continuation; the most likely outcome is first."""
    proposals = draft.proposals(opening(1))
    assert 1 < len(proposals) <= 4
    assert [p.base_len for p in proposals] == [len(PROMPT) + 1] * len(proposals)
    assert len({tuple(p.assumed_token_ids) for p in proposals}) == len(proposals)
    assert list(proposals[0].assumed_token_ids) == truth(PROMPT, 1)
    for proposal in proposals:
        assert list(proposal.token_ids) == truth([*PROMPT, *proposal.assumed_token_ids], 3)


def test_outcomes_of_a_round_with_drafts(draft: Draft, truth: Greedy) -> None:
    """Rejections at several positions, and the bonus token, during the round."""
    first = draft.proposals(opening(1, fan_out=16))[0]
    ahead = draft.proposals(draft.commit(1, first.assumed_token_ids))
    kept = [len(PROMPT) + 1 + n for n in range(1, 5)]
    assert {p.base_len for p in ahead} <= set(kept)
    assert kept[-1] in {p.base_len for p in ahead}, "all accepted"
    assert len({p.base_len for p in ahead}) > 1, "and some rejection"
    for proposal in ahead:
        context = [*PROMPT, *first.assumed_token_ids, *proposal.assumed_token_ids]
        assert list(proposal.token_ids) == truth(context, 3)


def test_fan_out_one_is_a_chain(draft: Draft, truth: Greedy) -> None:
    proposals = draft.proposals(opening(1, fan_out=1, lookahead=2))
    assert [p.base_len for p in proposals] == [len(PROMPT) + n for n in (1, 5)]
    assert path(proposals[-1]) == truth(PROMPT, 8)
    assert draft.engine.store.num_sequences == 1, "no forks"


@pytest.mark.parametrize("fields", [{"lookahead": 0}, {"ahead_gamma": 0}, {"fan_out": 0}])
def test_nothing_is_drafted_ahead_if_not_asked_for(
    fields: dict[str, Any], draft: Draft, truth: Greedy
) -> None:
    assert draft.proposals(opening(1, **fields)) == []
    (proposal,) = draft.proposals(draft.commit(1, [9], ahead_gamma=fields.get("ahead_gamma", 3)))
    assert (proposal.base_len, list(proposal.assumed_token_ids)) == (len(PROMPT) + 1, [])
    assert list(proposal.token_ids) == truth([*PROMPT, 9], 3)


def test_draft_tokens_for_the_prompts_own_round(draft: Draft, truth: Greedy) -> None:
    """Regression: gamma of an open was ignored."""
    proposals = draft.proposals(opening(1, gamma=2, lookahead=0))
    assert [(p.base_len, list(p.token_ids)) for p in proposals] == [(len(PROMPT), truth(PROMPT, 2))]


def test_a_foreseen_outcome_is_not_drafted_again(draft: Draft) -> None:
    """The branch keeps its KV: only tokens after it are run and sent."""
    branch = draft.proposals(opening(1))[-1]
    main = draft.engine.passes[0][0].sequence
    end = branch.base_len + len(branch.token_ids)
    draft.engine.passes.clear()
    proposed = draft.proposals(draft.commit(1, branch.assumed_token_ids))
    assert proposed, "it is drafted on from"
    assert all(proposal.base_len > branch.base_len for proposal in proposed)
    for fed in (fed for parts in draft.engine.passes for fed in parts):
        if fed.sequence is main:
            assert fed.start >= end - 1, "its last token at most: that draws the guess"
        elif fed.start < end:
            assert fed.token_ids != [branch.token_ids[fed.start - branch.base_len]]


def test_an_unforeseen_outcome_drops_all_branches(draft: Draft, truth: Greedy) -> None:
    proposals = draft.proposals(opening(1))
    other = next(t for t in range(256) if t not in {p.assumed_token_ids[0] for p in proposals})
    commit = draft.commit(1, [other, 9])
    draft.proposer.step([commit], lambda: True)
    assert draft.engine.store.num_sequences == 1, "no branch is left"
    first = draft.engine.passes[-1]
    assert [(fed.start, fed.token_ids) for fed in first] == [(len(PROMPT), [other, 9])]
    again = draft.proposals()
    assert list(again[0].token_ids) == truth([*PROMPT, other, 9], 3)


def test_stale_drafting_stops_within_a_step(draft: Draft) -> None:
    """A commit during drafting: the next pass runs the committed tokens."""
    draft.step(opening(1, lookahead=4, ahead_gamma=16, fan_out=8))
    for _ in range(10):
        draft.step()
    draft.engine.passes.clear()
    draft.step(draft.commit(1, [250, 251, 252]))
    assert [fed.token_ids[-1] for fed in draft.engine.passes[0]] == [252]
    assert draft.engine.store.num_sequences == 1


def test_a_commit_with_smaller_gamma_completes_the_branch(draft: Draft, truth: Greedy) -> None:
    """A half-drafted block is sent at once if it has as many tokens as asked for."""
    draft.step(opening(1, ahead_gamma=8, fan_out=1))
    draft.step()
    draft.step()
    first, second, third = truth(PROMPT, 3)
    events = draft.step(draft.commit(1, [first], gamma=1, ahead_gamma=0))
    (proposal,) = [event for event in events if isinstance(event, Proposed)]
    assert proposal.base_len == len(PROMPT) + 1
    assert list(proposal.token_ids) == [second, third]
    assert draft.run() == []


def test_an_unlikely_block_with_supports_is_sent_when_a_commit_leads_to_it(draft: Draft) -> None:
    """Most such blocks are never used, and would be most of the draft's traffic."""
    fields = {"sampling": {"temperature": 1.0}, "fan_out": 16, "gamma": 3}
    proposals = draft.proposals(opening(1, **fields))
    assert all(proposal.supports for proposal in proposals)
    proposed = {tuple(proposal.assumed_token_ids) for proposal in proposals}
    kept = [path for path in draft.drafted(1) if path not in proposed]
    assert min(len(kept), len(proposed)) > 2
    draft.engine.passes.clear()
    (proposal, *_) = draft.step(draft.commit(1, kept[-1], ahead_gamma=0))
    assert isinstance(proposal, Proposed)
    assert (list(proposal.assumed_token_ids), len(proposal.token_ids)) == ([], 3)
    assert proposal.base_len == len(PROMPT) + len(kept[-1])
    assert len(proposal.supports or ()) == 3
    assert draft.engine.passes == [], "it was drafted already"
    assert draft.run() == [], "and is sent once"


def test_over_a_long_link_all_blocks_are_sent_at_once(draft: Draft) -> None:
    """There a hop costs more than the bytes."""
    fields = {"sampling": {"temperature": 1.0}, "fan_out": 16, "tells_unlikely": True}
    proposals = draft.proposals(opening(1, **fields))
    proposed = {tuple(proposal.assumed_token_ids) for proposal in proposals}
    assert proposed == set(draft.drafted(1))


def test_drafting_stops_at_gamma_0_and_starts_again(draft: Draft, truth: Greedy) -> None:
    """Nothing is drafted or sent; then many tokens are committed at once."""
    draft.proposals(opening(1))
    draft.engine.passes.clear()
    assert draft.proposals(draft.commit(1, [9], gamma=0, ahead_gamma=0)) == []
    assert positions(draft.engine.passes) == []
    assert draft.engine.store.num_sequences == 1
    many = list(range(20, 60))
    proposed = draft.proposals(draft.commit(1, many))
    assert list(proposed[0].token_ids) == truth([*PROMPT, 9, *many], 3)


def test_without_branches_the_work_ends(engine: Engine, clock: Clock, truth: Greedy) -> None:
    """Regression: with max_branches 0 the device thread never stopped looking for rows."""
    draft = Draft(engine, clock, max_branches=0)
    assert draft.proposals(opening(1)) == []
    (proposal,) = draft.proposals(draft.commit(1, [9]))
    assert list(proposal.token_ids) == truth([*PROMPT, 9], 3)
    draft.close()


def test_the_work_ends_whatever_is_asked_for(draft: Draft) -> None:
    """Everything drafted, a full context, or one allowed token: no work is left."""
    draft.run(opening(1, lookahead=4, fan_out=64, ahead_gamma=8, max_len=40))
    draft.run(opening(2, lookahead=4, sampling={"allowed_token_ids": (7,)}))
    draft.run(opening(3, max_len=len(PROMPT) + 2))
    draft.run(draft.commit(3, [1, 2]))
    draft.engine.passes.clear()
    for _ in range(3):
        assert draft.step() == []
    assert draft.engine.passes == []


def test_needed_rows_are_served_first_and_in_batches(engine: Engine, clock: Clock) -> None:
    """If rows take time: the oldest eight until they have their tokens, then the next."""
    draft = Draft(engine, clock, token_s=0.001)
    numbers = list(range(1, 21))
    for number in numbers:
        draft.run(opening(number, [number, *PROMPT[1:]], max_len=32))
    draft.engine.passes.clear()
    events = draft.step(*(draft.commit(number, [200 + number]) for number in numbers))
    served: list[int] = []
    while True:
        proposed = [e for e in events if isinstance(e, Proposed) and not e.assumed_token_ids]
        served += [proposal.key.generation_id for proposal in proposed]
        if len(served) == len(numbers):
            break
        events = draft.step()
    assert served == numbers
    assert max(len(fed) for fed in draft.engine.passes) == 8
    waited = [fed.start for fed in draft.engine.passes[0]]
    assert waited == [len(PROMPT)] * 8, "the committed tokens, and nothing ahead"
    assert len(draft.engine.passes) == 9, "three batches of three tokens"
    draft.close()


def test_a_new_session_gets_the_room_of_branches(draft: Draft, truth: Greedy) -> None:
    """Branches are freed first; their generation goes on."""
    draft.run(opening(1, max_len=400, lookahead=4, ahead_gamma=16, fan_out=16))
    assert draft.engine.store.used_tokens > KV_TOKENS - 512
    events = draft.run(opening(2, [2] * 700, max_len=800))
    assert not [event for event in events if isinstance(event, Failure)]
    draft.engine.store.check_integrity()
    (full,) = [e for e in draft.run(opening(3, [3] * 400, max_len=500)) if isinstance(e, Failure)]
    assert full.reason is FailureReason.KV_FULL
    draft.committed[2] = 700
    for number, context in ((1, PROMPT), (2, [2] * 700)):
        proposed = draft.proposals(draft.commit(number, [9]))
        assert list(proposed[0].token_ids) == truth([*context, 9], 3)


def test_branches_stay_if_their_room_would_not_be_enough(draft: Draft) -> None:
    draft.run(opening(1, max_len=400, lookahead=4, ahead_gamma=16, fan_out=16))
    before = draft.drafted(1)
    assert len(before) > 3
    taken = draft.engine.store.open(16)
    (full,) = [e for e in draft.run(opening(2, [2] * 1000, max_len=1020)) if isinstance(e, Failure)]
    assert full.reason is FailureReason.KV_FULL
    assert draft.drafted(1) == before
    draft.engine.store.free(taken)


def test_branches_are_freed_a_tree_at_a_time(draft: Draft, clock: Clock) -> None:
    """The tree of the oldest commit first, and no other if it is enough."""
    for number in (1, 2):
        draft.run(opening(number, max_len=120, lookahead=1, ahead_gamma=3, fan_out=8))
        clock.now += 1.0
    draft.run(draft.commit(1, [9]))
    kept, gone = draft.drafted(1), draft.drafted(2)
    assert min(len(kept), len(gone)) > 2
    taken = draft.engine.store.open(KV_TOKENS - draft.engine.store.used_tokens)
    assert not [
        e for e in draft.step(opening(3, [3] * 20, max_len=60)) if not isinstance(e, Proposed)
    ]
    assert draft.drafted(1) == kept
    assert not draft.drafted(2)
    draft.engine.store.free(taken)
    draft.run()


def test_the_session_opened_last_is_preempted_by_one_that_grows(
    draft: Draft, truth: Greedy
) -> None:
    """It fails with KV_FULL; the others are drafted for to their end."""
    numbers, context = (1, 2, 3), {n: [n] * 300 for n in (1, 2, 3)}
    for number in numbers:
        draft.run(opening(number, context[number], max_len=800, lookahead=0))
        draft.committed[number] = 300
        assert draft.proposals(draft.commit(number, [9], ahead_gamma=0))
        context[number].append(9)
    lost: list[int] = []
    while len(lost) < 2:
        number = next(n for n in numbers if n not in lost)
        new = [(7 * len(context[number]) + n) % 256 for n in range(40)]
        context[number] += new
        events = draft.run(draft.commit(number, new, ahead_gamma=0))
        lost += [e.key.generation_id for e in events if isinstance(e, Failure)]
        proposed = [e for e in events if isinstance(e, Proposed)]
        assert list(proposed[-1].token_ids) == truth(context[number], 3)
        draft.engine.store.check_integrity()
    assert lost == [3, 2]


def test_full_memory_costs_branches_only(draft: Draft, truth: Greedy) -> None:
    """Without a page for forks, the chain on the main branch is drafted, and nothing fails."""
    taken = draft.engine.store.open(KV_TOKENS - 16)
    proposed = draft.proposals(opening(1, max_len=128, fan_out=8))
    assert [list(p.token_ids) for p in proposed] == [truth(PROMPT, 4)[1:]]
    proposed = draft.proposals(draft.commit(1, [9]))
    assert list(proposed[0].token_ids) == truth([*PROMPT, 9], 3)
    draft.engine.store.free(taken)
    proposed = draft.proposals(draft.commit(1, [9]))
    assert len(proposed) > 2, "there is room again"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Commit(key(1), [9], 99, 3, 3), "committed_len"),
        (Commit(key(1), [], len(PROMPT), 3, 3), "committed_len"),
        (Commit(key(1), [256], len(PROMPT) + 1, 3, 3), "token_ids"),
        (Commit(key(1), [9, 2**32 - 1], len(PROMPT) + 2, 3, 3), "token_ids"),
        (Commit(key(1), [9], len(PROMPT) + 1, 17, 3), "gamma"),
        (Commit(key(1), [9], len(PROMPT) + 1, 3, 17), "ahead_gamma"),
    ],
)
def test_a_bad_commit_ends_its_generation_alone(
    bad: Commit, said: str, draft: Draft, truth: Greedy
) -> None:
    draft.run(opening(1, sampling={"repetition_penalty": 1.1}), opening(2))
    events = draft.run(bad, draft.commit(2, [9]))
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert (failure.key, failure.reason) == (key(1), FailureReason.BAD_MESSAGE)
    assert said in failure.detail
    proposed = [e for e in events if isinstance(e, Proposed) and e.key == key(2)]
    assert list(proposed[0].token_ids) == truth([*PROMPT, 9], 3)
    assert draft.proposer.num_open == 1


def test_an_absurd_lookahead_is_refused(draft: Draft) -> None:
    """Regression: a chain of certain tokens grew deeper than the interpreter's stack."""
    events = draft.run(
        opening(1, lookahead=2**32 - 1, ahead_gamma=1, max_len=900,
                sampling={"allowed_token_ids": (7,)}),
        opening(2),
    )  # fmt: skip
    assert [e.key for e in events if isinstance(e, Failure)] == [key(1)]
    assert [e for e in events if isinstance(e, Proposed) and e.key == key(2)]
