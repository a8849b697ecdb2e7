"""The draft tier as a draft source: failures of draft replicas, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from structlog.testing import capture_logs

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.rollout import DraftRollout, RolloutTiming
from orchestrator.replicas.tier_drafts import FIRST_BACKOFF_S, MAX_BACKOFF_S, TierDrafts
from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.gamma import GammaPolicy
from outrider.draft_rollout import AcceptanceSums, Rollout
from outrider.replica import CostReport
from outrider.runtime.protobuf import UINT32, pack
from outrider.v1 import draft_pb2, model_pb2
from tests.orchestrator.replicas.requests import draft_request
from tests.orchestrator.replicas.test_replica_stream import any_model
from tests.services.fake_draft import Answer, FakeDraft, faking
from tests.stack import eventually

NUM_REPLICAS = 3
Request = draft_pb2.DraftOpen | draft_pb2.DraftCommit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def failure(request: Request, reason: Any) -> draft_pb2.DraftLost:
    return draft_pb2.DraftLost(generation_id=request.generation_id, reason=reason, detail="why")


@contextlib.asynccontextmanager
async def pool_of(
    answers: list[Answer], fingerprints: Sequence[str] = ()
) -> AsyncIterator[ReplicaPool[DraftLink]]:
    """Connected fake replicas, one for each of the answers; `fingerprints` of their models."""

    def make_link(endpoint: str, on_change: Callable[[], None]) -> DraftLink:
        return DraftLink(endpoint, any_model, on_change)

    async with asyncio.timeout(100), contextlib.AsyncExitStack() as stack:
        fakes = [
            FakeDraft(model_pb2.ModelInfo(max_gamma=8, model_fingerprint=fingerprint), answer)
            for answer, fingerprint in itertools.zip_longest(answers, fingerprints, fillvalue="")
        ]
        endpoints = [await stack.enter_async_context(faking(fake)) for fake in fakes]
        pool = ReplicaPool("draft", make_link, endpoints)
        await stack.enter_async_context(pool.running())

        async def are_connected() -> bool:
            return pool.num_connected == len(answers)

        await eventually(are_connected)
        yield pool


async def lost(source: TierDrafts) -> None:
    async def is_lost() -> bool:
        return not source.is_open

    await eventually(is_lost)


async def test_a_request_that_fails_every_draft_replica_opens_them_less_and_less_often() -> None:
    """Otherwise it would stop one replica after the other, once per second each."""

    def fails(request: Request) -> list[draft_pb2.DraftLost]:
        return [failure(request, draft_pb2.DraftLost.REASON_INTERNAL)]

    clock = Clock()
    async with pool_of([fails] * NUM_REPLICAS) as pool:
        source = TierDrafts(pool, draft_request([1, 2, 3]), clock=clock)
        with capture_logs() as logs:
            assert source.open(4, 1)
            await lost(source)
            assert source.open(4, 1), "at another replica at once"
            delay_s = FIRST_BACKOFF_S
            for _ in range(8):
                await lost(source)
                assert not source.open(4, 1)
                clock.now += 0.5 * delay_s
                assert not source.open(4, 1)
                clock.now += 0.5 * delay_s
                assert source.open(4, 1)
                delay_s = min(2 * delay_s, MAX_BACKOFF_S)
            assert delay_s == MAX_BACKOFF_S
        assert [entry["event"] for entry in logs].count("drafts_back_off") == 1

        await lost(source)
        clock.now += MAX_BACKOFF_S + 1.0  # noticed only now: it worked for that long
        assert source.open(4, 1)
        source.close(keep=False)


async def test_a_lack_of_room_is_no_failure_of_the_replica() -> None:
    """The request is not to blame for it: after the delay of the replica it is tried again."""

    def is_full(request: Request) -> list[draft_pb2.DraftLost]:
        return [failure(request, draft_pb2.DraftLost.REASON_KV_FULL)]

    clock = Clock()
    async with pool_of([is_full]) as pool:
        source = TierDrafts(pool, draft_request([1, 2, 3]), clock=clock)
        for _ in range(5):
            assert source.open(4, 1)
            await lost(source)
            assert not source.open(4, 1)
            clock.now += 1.0
        source.close(keep=False)


async def test_proposals_are_used_although_their_generation_failed_at_the_draft() -> None:
    """It may have failed because of a token that it proposed, such as one that gives NaN there.

    Then a proposal that was dropped would be one that was dropped for its tokens, which biases the
    output of rejection and block verification.
    """
    requests: list[Request] = []

    def propose_and_fail(request: Request) -> list[Any]:
        requests.append(request)
        if isinstance(request, draft_pb2.DraftOpen):
            return []
        proposal = draft_pb2.Proposal(
            generation_id=request.generation_id,
            base_len=request.committed_len,
            token_ids=pack([5, 6, 7], UINT32),
        )
        return [proposal, failure(request, draft_pb2.DraftLost.REASON_INTERNAL)]

    async with pool_of([propose_and_fail] * 2) as pool:
        context = [1, 2, 3]
        source = TierDrafts(pool, draft_request(context))
        costs = CostBook(lambda _: CostReport(), lambda _: CostReport())
        policy = GammaPolicy(costs.pair(), 8, fixed=3, fixed_wait_s=60.0)
        drafting = Drafting(source, policy, costs, lookahead=1)
        drafting.open()
        context.append(4)
        assert drafting.next(10) is None
        proposal = await drafting.wait(10)
        assert proposal is not None
        assert proposal.token_ids == (5, 6, 7)
        await lost(source)

        context.append(5)  # as if the round had gone without it
        rest = drafting.next(10)
        assert rest is not None
        assert rest.token_ids == (6, 7)
        assert not source.open(3, 1), "not before its proposals are used up"

        context.append(9)
        assert drafting.next(10) is None
        assert source.is_open, "at the other replica"
        drafting.close(keep=False)
    assert [type(request) for request in requests[:2]] == [
        draft_pb2.DraftOpen,
        draft_pb2.DraftCommit,
    ]


def answers_nothing(request: Request) -> list[draft_pb2.Proposal]:
    return []


async def test_a_generation_moves_to_the_revision_that_the_rollout_assigns() -> None:
    """At each change, after a delay; and only if a replica of that revision is there."""
    clock, drawn = Clock(), [0.9]
    async with pool_of([answers_nothing] * 2, ["old", "new"]) as pool:
        rollout = DraftRollout(draw=lambda: drawn[0])
        source = TierDrafts(pool, draft_request([1, 2, 3]), rollout=rollout, clock=clock)

        def revision_after(record: Rollout, draw: float) -> str:
            drawn[0] = draw
            rollout.adopt(record)
            former = source.revision
            source.refresh()
            assert source.revision == former, "not all generations move at once"
            clock.now += RolloutTiming().spread_s
            source.refresh()
            assert source.open(4, 1)
            return source.revision

        assert source.open(4, 1)
        assert revision_after(Rollout(1, current="old"), 0.9) == "old"
        assert revision_after(Rollout(2, current="old", trial="new"), 0.01) == "new"
        assert revision_after(Rollout(3, current="old", rolled_back=("new",)), 0.01) == "old"
        assert revision_after(Rollout(4, current="new"), 0.01) == "new"
        assert revision_after(Rollout(5, current="gone", trial="old"), 0.9) == "old"
        source.close(keep=False)


async def test_the_acceptance_of_each_assignment_is_reported_once() -> None:
    """Draft tokens of a replica of another revision do not count."""
    clock, drawn = Clock(), [0.3]
    async with pool_of([answers_nothing], ["old"]) as pool:
        rollout = DraftRollout(draw=lambda: drawn[0])
        rollout.adopt(Rollout(1, current="old", trial="new"))
        source = TierDrafts(pool, draft_request([1, 2, 3]), rollout=rollout, clock=clock)
        assert source.open(4, 1)
        for _ in range(10):
            source.observe_round(4, 3, is_rejected=True)
        source.observe_round(0, 0, is_rejected=False)
        source.close(keep=False)
        source.close(keep=False)
        assert rollout.unsent == {"old": AcceptanceSums().plus(30 / 40)}

        drawn[0] = 0.01
        source = TierDrafts(pool, draft_request([1, 2, 3]), rollout=rollout, clock=clock)
        assert source.open(4, 1), "without the canary, at the current revision"
        for _ in range(10):
            source.observe_round(4, 3, is_rejected=True)
        source.close(keep=False)
        assert list(rollout.unsent) == ["old"]
        assert rollout.counts["old"].num_draft_tokens == 80
