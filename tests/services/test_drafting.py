"""A generation and its draft: commits, proposals used, waits, and pauses. With a scripted draft.

Greedy, so that each output has one right answer and the draft can be right or wrong at will. The
target is simulated, so that γ does not depend on the load of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import grpc
import pytest

import orchestrator.generation.recorder
import target_service.app
from orchestrator.replicas import target_client as target_link
from orchestrator.speculation import drafting
from outrider.engine.simulated import SimulatedEngine
from outrider.model_server import step_costs as costs
from outrider.runtime.protobuf import UINT32, pack, unpack
from outrider.settings.services import TargetConfig
from outrider.settings.simulation import Simulation
from outrider.v1 import draft_pb2, model_pb2, orchestrator_pb2, target_pb2, target_pb2_grpc
from tests.services.fake_draft import FakeDraft, faking
from tests.services.noting import Clock
from tests.services.parts import (
    GREEDY,
    KV_TOKENS,
    STUCK_AFTER_S,
    Brake,
    Greedy,
    Pair,
    System,
    Tiers,
    both_tiers,
    disturbed,
    orchestrating,
)
from tests.stack import Output, request

PROMPT = [3, 1, 4, 1, 5]
ACCEPTED = orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED
# A longer pass takes the target hardly longer. A draft step takes a tenth of a pass.
TARGET = Simulation.parse("step_ms=1:6/64:8,vocab_size=256", is_draft=False)
STEP_S = 0.0006


class DraftMessage(NamedTuple):
    """A commit, or an open (`num_tokens` 0), as received by the draft."""

    generation_id: int
    num_tokens: int
    committed_len: int
    gamma: int
    ahead_gamma: int

    @property
    def asks_for_nothing(self) -> bool:
        return self.gamma == 0 and self.ahead_gamma == 0


class Script:
    """Knows the output beforehand. `answer` makes the proposals, `received` has all messages."""

    def __init__(
        self, num_tokens: int, answer: Callable[[Script, DraftMessage], list[Any]]
    ) -> None:
        """`num_tokens`: length of the output."""
        engine, self.path = SimulatedEngine(TARGET), list(PROMPT)
        for _ in range(num_tokens):
            self.path.append(engine.truth(len(self.path), self.path[-1]))
        self.received: list[DraftMessage] = []
        self.committed: list[int] = []
        self._answer = answer

    def __call__(
        self, item: draft_pb2.DraftOpen | draft_pb2.DraftCommit
    ) -> list[draft_pb2.Proposal]:
        token_ids = unpack(item.token_ids, UINT32, "token_ids").tolist()
        if isinstance(item, draft_pb2.DraftOpen):
            self.committed, num_tokens = [], 0
        else:
            num_tokens = len(token_ids)
        self.committed += token_ids
        message = DraftMessage(
            item.generation_id, num_tokens, len(self.committed), item.gamma, item.ahead_gamma
        )
        if isinstance(item, draft_pb2.DraftCommit):
            assert item.committed_len == message.committed_len
        self.received.append(message)
        return self._answer(self, message)

    def proposal(
        self,
        message: DraftMessage,
        base_len: int,
        num_tokens: int,
        *,
        assumed_from: int | None = None,
        shift: int = 0,
    ) -> draft_pb2.Proposal:
        """The right tokens from `base_len` on; with `shift` they and the assumed ones are wrong."""
        start = base_len if assumed_from is None else assumed_from
        tokens = [(t + shift) % 256 for t in self.path[start : base_len + num_tokens]]
        return draft_pb2.Proposal(
            generation_id=message.generation_id,
            base_len=base_len,
            assumed_token_ids=pack(tokens[: base_len - start], UINT32),
            token_ids=pack(tokens[base_len - start :], UINT32),
        )


class PricedDraft(FakeDraft):
    """Reports costs: `STEP_S` per step, and `token_s` for each further token of a pass."""

    def __init__(self, model: model_pb2.ModelInfo, script: Script, token_s: float) -> None:
        super().__init__(model, script)
        self._token_s = token_s

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        info = await super().GetModelInfo(request, context)
        steps_s = [STEP_S, STEP_S + self._token_s]
        costs = model_pb2.StepCosts(num_tokens=[1, 2], step_s=steps_s, mean_num_rows=1)
        info.costs.CopyFrom(costs)
        return info


async def _model_of(tiers: Tiers) -> model_pb2.ModelInfo:
    async with grpc.aio.insecure_channel(tiers.endpoints[0]) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        asked = target_pb2.TargetServiceGetModelInfoRequest()
        return (await stub.GetModelInfo(asked)).model


@contextlib.asynccontextmanager
async def scripted(
    redis_url: str, script: Script, *, token_s: float = 0.0, **settings: Any
) -> AsyncIterator[System]:
    """Rounds cost what the tiers report, whatever the machine's load."""
    config = TargetConfig(
        simulate=str(TARGET), port=0, kv_cache_tokens=KV_TOKENS, stuck_after_s=STUCK_AFTER_S
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_link, "time", Clock())
        # Costs measured on a busy machine could make drafts free.
        patch.setattr(costs, "_time_pass", _reported_time)
        patch.setattr(costs.StepCosts, "observe", lambda *_: None)
        async with target_service.app.serving(config) as target:
            tiers = Tiers(target, None)
            fake = PricedDraft(await _model_of(tiers), script, token_s)
            async with (
                faking(fake) as endpoint,
                orchestrating(tiers, redis_url, draft_endpoint=endpoint, **settings) as stack,
            ):
                yield stack


def _reported_time(engine: Any, counts: list[int], repeat_s: float) -> float:
    return TARGET.costs.pass_s(sum(counts), len(counts))


async def _ask(stack: System, num_tokens: int, **fields: Any) -> Output:
    return await stack.generate(PROMPT, sampling={**GREEDY, "max_tokens": num_tokens}, **fields)


async def test_the_rest_of_a_late_proposal_is_used(redis_url: str) -> None:
    """Each proposal is for the commit before the last one. Its first tokens are committed then."""

    def one_commit_late(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        before = message.committed_len - message.num_tokens
        return (
            [script.proposal(message, before, message.num_tokens + 4)] if message.num_tokens else []
        )

    script = Script(80, one_commit_late)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, 60, gamma=8)
    assert output.token_ids == script.path[5:65]
    stats = output.speculation
    assert stats.num_rejected_tokens == 0
    # A plain round at first, eleven with four draft tokens, one with the rest.
    assert stats.num_accepted_tokens == 47
    assert stats.num_rounds == 13


async def test_proposals_for_other_outcomes_are_not_used(redis_url: str) -> None:
    """For every round the draft proposes ahead for the right outcome and for a wrong one."""

    def proposes_ahead(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        here, ahead = message.committed_len, message.ahead_gamma
        first = [script.proposal(message, here, message.gamma)] if message.gamma else []
        # The block under verification, if any, and the bonus token after it.
        block = ahead if message.num_tokens else 0
        after = here + block + 1
        wrong = script.proposal(message, after, ahead, assumed_from=here, shift=1)
        right = script.proposal(message, after, ahead, assumed_from=here)
        return [*first, wrong, right]

    script = Script(90, proposes_ahead)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, 60, gamma=4)
    assert output.token_ids == script.path[5:65]
    assert output.speculation.num_rejected_tokens == 0
    assert output.speculation.num_lookahead_hits > 0
    assert output.speculation.num_accepted_tokens >= 45
    # After a look-ahead hit no draft tokens are requested for the current round.
    hits = [each for each in script.received if each.num_tokens and each.gamma == 0]
    assert len(hits) >= output.speculation.num_lookahead_hits


@pytest.mark.slow
async def test_a_draft_that_does_not_pay_is_paused_and_found_again(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong until γ is 0: then it gets no commits until a probe. Later it is right."""
    monkeypatch.setattr(drafting, "time", Clock())  # the draft is never measured as late
    num_tokens = 900

    def wrong_then_right(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        num_probes = sum(each.num_tokens > 16 for each in script.received)
        shift = 0 if num_probes >= 2 else 1
        gamma = min(message.gamma, num_tokens)
        return (
            [script.proposal(message, message.committed_len, gamma, shift=shift)] if gamma else []
        )

    script = Script(num_tokens + 20, wrong_then_right)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, num_tokens)
    assert output.token_ids == script.path[5 : 5 + num_tokens]
    assert any(each.asks_for_nothing for each in script.received)
    # After a pause it gets all tokens committed meanwhile, in order.
    assert script.committed == script.path[: len(script.committed)]
    assert sum(each.num_tokens > 16 for each in script.received) >= 2
    assert ACCEPTED not in output.origins[:40]
    assert output.origins[-100:].count(ACCEPTED) > 30
    stats = output.speculation
    assert len(script.received) < stats.num_rounds
    assert stats.num_rounds_per_gamma[0] > 32
    assert stats.decision.gamma > 0
    assert not stats.decision.is_fixed


@pytest.mark.slow
async def test_a_draft_that_never_proposes_gets_few_requests(redis_url: str) -> None:
    """By the choice of γ: it is not considered unresponsive for seconds yet."""
    script = Script(400, lambda script, message: [])
    async with scripted(redis_url, script, draft_wait_ms=None) as stack:
        output = await _ask(stack, 400)
    assert output.token_ids == script.path[5:405]
    assert output.speculation.num_drafts == 0
    assert output.speculation.num_rounds == 400
    assert 0 < len(script.received) < 120


async def test_a_draft_that_processes_its_prompt_is_not_waited_for(redis_url: str) -> None:
    """The time of the prompt does not count as overhead either."""
    script = Script(40, lambda script, message: [])
    # A prompt of five tokens is expected to take 48 s.
    async with scripted(redis_url, script, token_s=6.0, draft_wait_ms=None) as stack:
        output = await _ask(stack, 40)
    assert output.token_ids == script.path[5:45]
    assert all(each.gamma == 0 for each in script.received if each.num_tokens)
    assert output.speculation.decision.draft_overhead_s < 0.002  # as before


@pytest.mark.slow
async def test_a_draft_that_has_to_catch_up_is_not_waited_for(redis_url: str) -> None:
    """It was paused while it did not pay. At a probe it first processes the tokens since."""

    def wrong(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        return [script.proposal(message, message.committed_len, 2, shift=1)]

    script = Script(400, wrong)
    # Five tokens are expected to take a sixth of a second, thirty more than a second.
    async with scripted(redis_url, script, token_s=0.02, draft_wait_ms=None) as stack:
        output = await _ask(stack, 400)
    assert output.token_ids == script.path[5:405]
    resumed = [each for each in script.received if each.num_tokens > 20]
    assert resumed, "it was paused, then probed"
    assert all(each.gamma == 0 for each in resumed)


async def test_cached_len_of_the_draft_counts_only_tokens_it_has_processed(
    redis_url: str,
) -> None:
    """A proposal with wrong assumed tokens shows nothing about the tokens committed since."""

    def mistaken(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        here = message.committed_len
        if not message.num_tokens:
            return []
        return [script.proposal(message, here + 3, 2, assumed_from=here - 1, shift=1)]

    script = Script(60, mistaken)
    async with scripted(redis_url, script, draft_wait_ms=50.0) as stack:
        output = await _ask(stack, 20, gamma=2, session_id="s", create_session=True)
        asked = orchestrator_pb2.GetSessionRequest(session_id="s")
        session = await stack.client.GetSession(asked)
    assert output.token_ids == script.path[5:25]
    assert (
        0 < session.draft_kv.cached_len <= max(each.committed_len for each in script.received) - 2
    )


async def test_a_draft_that_is_lost_during_a_wait(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output continues at once, and the estimates of the draft's overhead do not change."""
    monkeypatch.setattr(orchestrator.generation.recorder, "MAX_PENDING_COMMITMENTS", 4)
    async with both_tiers(pair) as tiers, orchestrating(tiers, redis_url) as stack:
        asked = request(PROMPT, {**GREEDY, "max_tokens": 300}, gamma=4)

        async def stop() -> None:
            assert tiers.draft is not None
            await tiers.draft.grpc_server.stop(0)

        output = await disturbed(stack.client, brake, asked, stop)
        again = await _ask(stack, 50)
    assert output.token_ids == greedy(PROMPT, 300)
    assert ACCEPTED in output.origins[:60]
    assert ACCEPTED not in output.origins[-60:]
    assert output.speculation.decision.draft_overhead_s < 1.0, "not the wait limit of 20 s"
    assert again.token_ids == greedy(PROMPT, 50)
    assert again.speculation.num_drafts == 0
    assert again.speculation.HasField("decision")
