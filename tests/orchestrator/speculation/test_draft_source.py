"""Contract of draft sources: every source must pass these tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.tier_drafts import TierDrafts
from orchestrator.speculation.acceptance import MatchAcceptance
from orchestrator.speculation.draft_source import DraftSource, NoDrafts
from orchestrator.speculation.lookup import LookupDrafts
from outrider.runtime.protobuf import UINT32, pack, unpack
from outrider.v1 import draft_pb2, model_pb2
from tests.orchestrator.replicas.requests import draft_request
from tests.orchestrator.replicas.test_replica_stream import any_model
from tests.services.fake_draft import FakeDraft, faking

GAMMA = 3
# The tokens 1 to 8 in turn. A replica proposes them by a rule, a lookup finds them in the prompt.
PERIOD = 8
PROMPT = [*range(1, PERIOD + 1), 1, 2, 3]
MakeSource = Callable[[list[int]], DraftSource]
Request = draft_pb2.DraftOpen | draft_pb2.DraftCommit


def following(last: int, num_tokens: int) -> tuple[int, ...]:
    """The tokens after `last`."""
    return tuple((last + k) % PERIOD + 1 for k in range(num_tokens))


class CountingDraft:
    """Proposes the tokens after the last committed one."""

    def __init__(self) -> None:
        self._context: list[int] = []
        self.gammas: list[int] = []

    def answer(self, request: Request) -> list[draft_pb2.Proposal]:
        self._context += unpack(request.token_ids, UINT32, "token_ids").tolist()
        gamma = max(request.gamma, request.ahead_gamma)
        self.gammas.append(gamma)
        if not gamma:
            return []
        ids = pack(following(self._context[-1], gamma), UINT32)
        return [
            draft_pb2.Proposal(
                generation_id=request.generation_id, base_len=len(self._context), token_ids=ids
            )
        ]


@contextlib.asynccontextmanager
async def tier_drafts() -> AsyncIterator[MakeSource]:
    """Sources at a fake draft replica over real gRPC."""
    fake = FakeDraft(model_pb2.ModelInfo(max_gamma=8), CountingDraft().answer)

    def make_link(endpoint: str, on_change: Any) -> DraftLink:
        return DraftLink(endpoint, any_model, on_change)

    async with faking(fake) as address:
        pool = ReplicaPool("draft", make_link, [address])
        async with pool.running():
            await pool.settled()

            yield lambda token_ids: TierDrafts(pool, draft_request(token_ids))


@contextlib.asynccontextmanager
async def no_drafts() -> AsyncIterator[MakeSource]:
    yield lambda token_ids: NoDrafts()


@contextlib.asynccontextmanager
async def lookup_drafts() -> AsyncIterator[MakeSource]:
    yield lambda token_ids: LookupDrafts(draft_request(token_ids), MatchAcceptance())


SOURCES = {"draft tier": tier_drafts, "lookup": lookup_drafts, "none": no_drafts}


@pytest.fixture(params=SOURCES)
async def make(request: pytest.FixtureRequest) -> AsyncIterator[MakeSource]:
    async with asyncio.timeout(100), SOURCES[request.param]() as make:
        yield make


async def test_a_source_that_is_not_open_proposes_nothing(make: MakeSource) -> None:
    """All its methods can be called."""
    source = make(list(PROMPT))
    assert not source.is_open
    assert source.replica is None
    assert source.wire_bytes == source.num_behind == source.cached_len == 0
    source.refresh()
    source.commit(GAMMA, GAMMA)
    source.suspend()
    assert source.propose() is None
    assert await source.wait(0.01) is None
    source.close(keep=False)


async def test_gamma_0_does_not_open_it(make: MakeSource) -> None:
    source = make(list(PROMPT))
    assert not source.open(0, 1)
    assert not source.is_open


async def test_open_succeeds_if_may_open(make: MakeSource) -> None:
    source = make(list(PROMPT))
    assert source.open(GAMMA, 1) == source.may_open == source.is_open
    assert source.replica is None or source.is_open
    source.close(keep=False)


async def test_proposals_continue_the_committed_tokens(make: MakeSource) -> None:
    """Each round commits all draft tokens and a bonus token."""
    context = list(PROMPT)
    source = make(context)
    source.open(GAMMA, 1)
    assert source.num_behind == (len(PROMPT) if source.is_open else 0)
    for _ in range(3):
        context += following(context[-1], 1)
        source.refresh()
        source.commit(GAMMA, GAMMA)
        proposal = await source.wait(60.0) if source.is_open else source.propose()
        assert (proposal is not None) == source.is_open
        if proposal is None:
            continue
        assert proposal.token_ids == following(context[-1], GAMMA)
        assert source.propose() == proposal
        context += proposal.token_ids
    assert source.num_behind == (GAMMA if source.is_open else 0)
    assert (source.wire_bytes > 0) == (source.replica is not None)
    source.close(keep=True)


async def test_proposals_that_assumed_other_tokens_are_dropped(make: MakeSource) -> None:
    context = list(PROMPT)
    source = make(context)
    source.open(GAMMA, 1)
    context += following(context[-1], 1)
    source.commit(GAMMA, GAMMA)
    if source.is_open:
        assert await source.wait(60.0) is not None
    context += [200, 201]  # as after a rejection
    assert source.propose() is None
    source.close(keep=False)


async def test_a_shorter_proposal_than_requested_is_not_returned(make: MakeSource) -> None:
    context = list(PROMPT)
    source = make(context)
    source.open(GAMMA, 1)
    context += following(context[-1], 1)
    source.commit(GAMMA, GAMMA)
    if source.is_open:
        assert await source.wait(60.0, GAMMA) is not None
    assert source.propose(GAMMA + 1) is None
    source.close(keep=False)


async def test_a_suspended_replica_is_not_used_for_a_while(make: MakeSource) -> None:
    source = make(list(PROMPT))
    source.open(GAMMA, 1)
    source.suspend()
    assert not source.is_open
    assert not source.open(GAMMA, 1)
    source.close(keep=False)
