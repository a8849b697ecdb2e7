"""Errors and lost KV room in the draft worker: only the generations concerned fail.

The faults are injected into the engine or its store, as a device or a defect would cause them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from structlog.testing import capture_logs

from draft_service.messages import Proposed
from outrider.engine import Engine, EngineOptions, load_engine
from outrider.engine.kv.store import Sequence
from outrider.model_server.messages import Close, Failure, FailureReason
from tests.draft_service.draft_worker import KV_TOKENS, PROMPT, Draft, key, opening
from tests.services.noting import Clock
from tests.services.parts import Greedy, Pair

PAGE = 16


def failures(events: list[Proposed | Failure]) -> dict[int, FailureReason]:
    return {e.key.generation_id: e.reason for e in events if isinstance(e, Failure)}


def broken_for(draft: Draft, session: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The store's method, with a bookkeeping error for the session's sequence."""

    def faulty(sequence: Sequence, *args: Any, **fields: Any) -> Any:
        live = draft.proposer._table.find(session)
        if live is not None and live.sequence is sequence:
            raise RuntimeError("a page of the sequence has two owners")
        return method(sequence, *args, **fields)

    return faulty


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("method", ["extend_with_prefix", "extend", "fork"])
def test_an_error_while_gathering_fails_its_generation_only(
    method: str, gamma: int, draft: Draft, truth: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first pass, as it grows, or as a branch is opened; the other one is drafted for."""
    store = draft.engine.store
    monkeypatch.setattr(store, method, broken_for(draft, "session-1", getattr(store, method)))
    events = draft.run(opening(1, gamma=gamma), opening(2, gamma=gamma))
    assert failures(events) == {1: FailureReason.INTERNAL}
    proposed = [e for e in events if isinstance(e, Proposed) and e.key == key(2)]
    assert len(proposed) > 2
    for proposal in proposed:
        expected = truth([*PROMPT, *proposal.assumed_token_ids], 3)
        assert list(proposal.token_ids) == expected[: len(proposal.token_ids)]
    monkeypatch.undo()
    store.check_integrity()


def test_an_error_of_no_generation_fails_all_that_have_work(
    draft: Draft, truth: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker goes on, and the error counts as a failed pass."""
    draft.run(*(opening(number, lookahead=0) for number in (1, 2, 3)))

    def fail(num_waiting: int, paces: object) -> tuple[int, int]:
        raise RuntimeError("no budget")

    errors: list[Exception] = []
    draft.proposer.health.on_failing = errors.append
    monkeypatch.setattr(draft.proposer._budget, "num_rows", fail)
    events = draft.step(draft.commit(1, [9]), draft.commit(2, [9]))
    assert failures(events) == dict.fromkeys((1, 2), FailureReason.INTERNAL)
    for number in (4, 5):
        assert failures(draft.step(opening(number))) == {number: FailureReason.INTERNAL}
    assert [str(error) for error in errors] == ["no budget"], "three in a row"
    monkeypatch.undo()
    (proposal,) = draft.run(draft.commit(3, [9], ahead_gamma=0))
    assert isinstance(proposal, Proposed)
    assert list(proposal.token_ids) == truth([*PROMPT, 9], 3)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_needed_row_is_dropped_with_its_preempted_generation(
    order: tuple[int, int], draft: Draft, truth: Greedy
) -> None:
    """Both are needed in the same pass; the one opened first takes the other one's page."""
    grown = [*PROMPT, *range(30, 40)]
    draft.run(opening(1, grown, gamma=1, lookahead=0), opening(2, gamma=1, lookahead=0))
    draft.committed[1] = len(grown)
    store = draft.engine.store
    taken = store.open(KV_TOKENS - store.used_tokens)
    # The other one grows, too, if its row comes after it was preempted.
    new = {1: [9], 2: [9] * (12 if order == (1, 2) else 1)}
    events = draft.run(*(draft.commit(number, new[number], ahead_gamma=0) for number in order))
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert (failure.key, failure.reason) == (key(2), FailureReason.KV_FULL)
    (proposal,) = [event for event in events if isinstance(event, Proposed)]
    assert list(proposal.token_ids) == truth([*grown, 9], 3)
    store.free(taken)


def test_a_needed_row_is_dropped_if_drafting_ahead_preempts_its_generation(
    draft: Draft, truth: Greedy
) -> None:
    """A later turn has its session's KV from the start, and may preempt before its first pass."""
    first_turn = [n % 250 for n in range(500)]
    draft.run(opening(1, first_turn, max_len=510, gamma=1, lookahead=0))
    draft.step(Close(key(1), keep=True))
    second_turn = [*first_turn, *(n % 240 for n in range(400))]
    events = draft.run(
        opening(2, second_turn, session_id="session-1", epoch=2, max_len=1000, fan_out=1),
        opening(3, [5] * 450, max_len=500, gamma=3, lookahead=0),
    )
    assert failures(events) == {3: FailureReason.KV_FULL}
    proposed = [event for event in events if isinstance(event, Proposed)]
    assert {proposal.key for proposal in proposed} == {key(2)}
    assert [*proposed[-1].assumed_token_ids, *proposed[-1].token_ids] == truth(second_turn, 4)


class BadDraft:
    """A draft whose model has NaN logits after `bad`, the token that it emits after PROMPT."""

    def __init__(self, pair: Pair, truth: Greedy, directory: Path, clock: Clock) -> None:
        (self.bad,) = truth(PROMPT, 1)
        shutil.copytree(pair.draft, directory)
        path = directory / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        weights["model.embed_tokens.weight"][self.bad] = float("nan")
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        self.engine: Engine = load_engine(EngineOptions(str(directory), kv_cache_tokens=KV_TOKENS))
        self.draft = Draft(self.engine, clock)
        self.errors: list[Exception] = []
        self.draft.proposer.health.on_failing = self.errors.append


@pytest.fixture
def bad_draft(pair: Pair, truth: Greedy, tmp_path: Path, clock: Clock) -> BadDraft:
    return BadDraft(pair, truth, tmp_path / "bad", clock)


def test_a_block_with_a_token_that_the_draft_cannot_run_is_sent_whole(
    bad_draft: BadDraft, truth: Greedy
) -> None:
    """Placeholders follow the token. After its rejection the KV is clean, in every branch."""
    draft, bad = bad_draft.draft, bad_draft.bad
    with capture_logs() as logs:
        proposals = draft.proposals(opening(1, gamma=3, fan_out=8))
    assert [entry["event"] for entry in logs] == ["draft_token_replaced"], "logged once"
    root = next(proposal for proposal in proposals if not proposal.assumed_token_ids)
    assert list(root.token_ids) == [bad, 0, 0]
    siblings = [p for p in proposals if p.assumed_token_ids and p.assumed_token_ids[0] != bad]
    assert len(siblings) > 2
    later = draft.proposals(draft.commit(1, [9]))
    for committed, made in ((PROMPT, siblings), ([*PROMPT, 9], later)):
        for proposal in made:
            expected = truth([*committed, *proposal.assumed_token_ids], 3)
            if bad not in (*proposal.assumed_token_ids, *expected):
                assert list(proposal.token_ids) == expected
    assert bad_draft.errors == [], "placeholders are no failed passes"
    draft.close()


def test_placeholders_have_a_support_of_their_own(bad_draft: BadDraft) -> None:
    """With supports: the distribution that is sent is the one that is sampled from."""
    draft, bad = bad_draft.draft, bad_draft.bad
    forced = {"temperature": 1.0, "logit_bias": {bad: 100.0}}
    (proposal,) = draft.proposals(opening(1, gamma=3, lookahead=0, sampling=forced))
    assert list(proposal.token_ids) == [bad, 0, 0]
    assert proposal.supports is not None
    assert [list(support.token_ids) for support in proposal.supports] == [[bad], [0], [0]]
    assert [support.weights.tolist() for support in proposal.supports[1:]] == [[1.0], [1.0]]
    assert all(support.weights.dtype == np.float32 for support in proposal.supports)
    draft.close()


def test_a_committed_token_that_the_draft_cannot_run_fails_the_generation(
    bad_draft: BadDraft,
) -> None:
    """Nothing sampled is lost then. Three in a row are the replica's failure."""
    draft, bad = bad_draft.draft, bad_draft.bad
    for number in (1, 2, 3):
        events = draft.run(opening(number, [*PROMPT, bad, 9], gamma=3, lookahead=0))
        assert failures(events) == {number: FailureReason.NON_FINITE}
    assert len(bad_draft.errors) == 1
    draft.close()
