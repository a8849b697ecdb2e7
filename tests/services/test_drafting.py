"""A generation and its draft: what is told, used, waited for and left alone. By a scripted draft.

Greedy, so that every output has one right answer and the draft can be as right as it likes. The
target is simulated: what γ is chosen by must not be what a small model's passes take on a busy
machine.
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
# A longer pass takes the target hardly more, a step of the draft a tenth of it.
TARGET = Simulation.parse("step_ms=1:6/64:8,vocab_size=256", is_draft=False)
STEP_S = 0.0006


class Told(NamedTuple):
    """A commit, or the open (`num_tokens` 0), as the draft got it."""

    generation_id: int
    num_tokens: int
    committed_len: int
    gamma: int
    ahead_gamma: int

    @property
    def is_quiet(self) -> bool:
        return self.gamma == 0 and self.ahead_gamma == 0


class Script:
    """Knows the output beforehand; `answer` says what is proposed, `told` what was asked so far."""

    def __init__(self, num_tokens: int, answer: Callable[[Script, Told], list[Any]]) -> None:
        """Of so many tokens after the prompt."""
        teller, self.path = SimulatedEngine(TARGET), list(PROMPT)
        for _ in range(num_tokens):
            self.path.append(teller.truth(len(self.path), self.path[-1]))
        self.told: list[Told] = []
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
        told = Told(
            item.generation_id, num_tokens, len(self.committed), item.gamma, item.ahead_gamma
        )
        if isinstance(item, draft_pb2.DraftCommit):
            assert item.committed_len == told.committed_len
        self.told.append(told)
        return self._answer(self, told)

    def proposal(
        self,
        told: Told,
        base_len: int,
        num_tokens: int,
        *,
        assumed_from: int | None = None,
        shift: int = 0,
    ) -> draft_pb2.Proposal:
        """The right tokens from `base_len` on; `shift` makes wrong ones of them and the assumed."""
        start = base_len if assumed_from is None else assumed_from
        tokens = [(t + shift) % 256 for t in self.path[start : base_len + num_tokens]]
        return draft_pb2.Proposal(
            generation_id=told.generation_id,
            base_len=base_len,
            assumed_token_ids=pack(tokens[: base_len - start], UINT32),
            token_ids=pack(tokens[base_len - start :], UINT32),
        )


class PricedDraft(FakeDraft):
    """Says also what its steps cost, and what each token of a longer pass adds."""

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
    """What comes late here is no lateness of the target's: rounds cost what the tiers say."""
    config = TargetConfig(
        simulate=str(TARGET), port=0, kv_cache_tokens=KV_TOKENS, stuck_after_s=STUCK_AFTER_S
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_link, "time", Clock())
        # On a busy machine passes take what they take: costs as measured could make drafts free.
        patch.setattr(costs, "_time_pass", _told_time)
        patch.setattr(costs.StepCosts, "observe", lambda *_: None)
        async with target_service.app.serving(config) as target:
            tiers = Tiers(target, None)
            fake = PricedDraft(await _model_of(tiers), script, token_s)
            async with (
                faking(fake) as endpoint,
                orchestrating(tiers, redis_url, draft_endpoint=endpoint, **settings) as stack,
            ):
                yield stack


def _told_time(engine: Any, counts: list[int], repeat_s: float) -> float:
    return TARGET.costs.pass_s(sum(counts), len(counts))


async def _ask(stack: System, num_tokens: int, **fields: Any) -> Output:
    return await stack.generate(PROMPT, sampling={**GREEDY, "max_tokens": num_tokens}, **fields)


async def test_the_rest_of_a_late_proposal_is_used(redis_url: str) -> None:
    """Each is for a commit before the last one: of all that is used the first tokens are gone."""

    def one_commit_late(script: Script, told: Told) -> list[draft_pb2.Proposal]:
        before = told.committed_len - told.num_tokens
        return [script.proposal(told, before, told.num_tokens + 4)] if told.num_tokens else []

    script = Script(80, one_commit_late)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, 60, gamma=8)
    assert output.token_ids == script.path[5:65]
    stats = output.speculation
    assert stats.num_rejected_tokens == 0
    # A plain round at the start, eleven with four draft tokens, one with what room is left.
    assert stats.num_accepted_tokens == 47
    assert stats.num_rounds == 13


async def test_outcomes_foreseen_are_used_and_others_are_not(redis_url: str) -> None:
    """For every round the draft has foreseen what comes, and something else as well."""

    def foresees(script: Script, told: Told) -> list[draft_pb2.Proposal]:
        here, ahead = told.committed_len, told.ahead_gamma
        first = [script.proposal(told, here, told.gamma)] if told.gamma else []
        # The block under verification, if any, and the target's own token after it.
        block = ahead if told.num_tokens else 0
        after = here + block + 1
        wrong = script.proposal(told, after, ahead, assumed_from=here, shift=1)
        right = script.proposal(told, after, ahead, assumed_from=here)
        return [*first, wrong, right]

    script = Script(90, foresees)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, 60, gamma=4)
    assert output.token_ids == script.path[5:65]
    assert output.speculation.num_rejected_tokens == 0
    assert output.speculation.num_lookahead_hits > 0
    assert output.speculation.num_accepted_tokens >= 45
    # Where it was foreseen, nothing was asked for but what comes after.
    hits = [told for told in script.told if told.num_tokens and told.gamma == 0]
    assert len(hits) >= output.speculation.num_lookahead_hits


@pytest.mark.slow
async def test_without_worth_the_draft_is_left_alone_and_found_again(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong for so long that γ is 0: told so once, then nothing until a probe; then right."""
    monkeypatch.setattr(drafting, "time", Clock())  # nor is the draft known to be late
    num_tokens = 900

    def wrong_then_right(script: Script, told: Told) -> list[draft_pb2.Proposal]:
        num_probes = sum(told.num_tokens > 16 for told in script.told)
        shift = 0 if num_probes >= 2 else 1
        gamma = min(told.gamma, num_tokens)
        return [script.proposal(told, told.committed_len, gamma, shift=shift)] if gamma else []

    script = Script(num_tokens + 20, wrong_then_right)
    async with scripted(redis_url, script) as stack:
        output = await _ask(stack, num_tokens)
    assert output.token_ids == script.path[5 : 5 + num_tokens]
    assert any(told.is_quiet for told in script.told)
    # All that came meanwhile is told at once, in order.
    assert script.committed == script.path[: len(script.committed)]
    assert sum(told.num_tokens > 16 for told in script.told) >= 2
    assert ACCEPTED not in output.origins[:40]
    assert output.origins[-100:].count(ACCEPTED) > 30
    stats = output.speculation
    assert len(script.told) < stats.num_rounds
    assert stats.num_rounds_per_gamma[0] > 32
    assert stats.decision.gamma > 0
    assert not stats.decision.is_fixed


@pytest.mark.slow
async def test_a_draft_that_never_answers_is_asked_less_and_less(redis_url: str) -> None:
    """With the patience that is chosen by worth; it is not given up as silent for seconds yet."""
    script = Script(400, lambda script, told: [])
    async with scripted(redis_url, script, draft_wait_ms=None) as stack:
        output = await _ask(stack, 400)
    assert output.token_ids == script.path[5:405]
    assert output.speculation.num_drafts == 0
    assert output.speculation.num_rounds == 400
    assert 0 < len(script.told) < 120


async def test_a_draft_still_at_its_prompt_is_not_waited_for(redis_url: str) -> None:
    """Nor is what the prompt takes learnt as the way's own lateness."""
    script = Script(40, lambda script, told: [])
    # A prompt of five tokens takes it a minute.
    async with scripted(redis_url, script, token_s=6.0, draft_wait_ms=None) as stack:
        output = await _ask(stack, 40)
    assert output.token_ids == script.path[5:45]
    assert all(told.gamma == 0 for told in script.told if told.num_tokens)
    assert output.speculation.decision.draft_overhead_s < 0.002  # as before


@pytest.mark.slow
async def test_a_draft_that_has_much_to_catch_up_is_not_waited_for(redis_url: str) -> None:
    """It was left alone while it did not pay; tried again, it first runs what was written since."""

    def wrong(script: Script, told: Told) -> list[draft_pb2.Proposal]:
        return [script.proposal(told, told.committed_len, 2, shift=1)]

    script = Script(400, wrong)
    # A prompt of five tokens takes it a sixth of a second, thirty take it more than one.
    async with scripted(redis_url, script, token_s=0.02, draft_wait_ms=None) as stack:
        output = await _ask(stack, 400)
    assert output.token_ids == script.path[5:405]
    woken = [told for told in script.told if told.num_tokens > 20]
    assert woken, "it was left alone, and tried again"
    assert all(told.gamma == 0 for told in woken)


async def test_what_the_draft_is_said_to_hold_it_was_told(redis_url: str) -> None:
    """Proposals that assume wrongly prove nothing of what was committed meanwhile."""

    def mistaken(script: Script, told: Told) -> list[draft_pb2.Proposal]:
        here = told.committed_len
        if not told.num_tokens:
            return []
        return [script.proposal(told, here + 3, 2, assumed_from=here - 1, shift=1)]

    script = Script(60, mistaken)
    async with scripted(redis_url, script, draft_wait_ms=50.0) as stack:
        output = await _ask(stack, 20, gamma=2, session_id="s", create_session=True)
        asked = orchestrator_pb2.GetSessionRequest(session_id="s")
        session = await stack.client.GetSession(asked)
    assert output.token_ids == script.path[5:25]
    assert 0 < session.draft_kv.cached_len <= max(told.committed_len for told in script.told) - 2


async def test_a_draft_that_is_lost_in_mid_stream(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is waited for: the output goes on at once, and nothing is learnt of patience."""
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
    assert output.speculation.decision.draft_overhead_s < 1.0, "of a patience of 20 s"
    assert again.token_ids == greedy(PROMPT, 50)
    assert again.speculation.num_drafts == 0
    assert again.speculation.HasField("decision")
