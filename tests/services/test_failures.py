"""A tier or Redis fails during an output: what the client gets, and what is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

import grpc
import numpy as np
import pytest

import orchestrator.app
import orchestrator.generation.recorder
from orchestrator.replicas import draft_client as draft_link
from orchestrator.sessions import StoreOptions
from outrider.redis.embedded import RedisServer
from outrider.runtime.protobuf import FLOAT32, UINT16, UINT32, pack
from outrider.v1 import (
    draft_pb2,
    model_pb2,
    orchestrator_pb2,
    sampling_pb2,
    target_pb2,
    target_pb2_grpc,
)
from tests.services.fake_draft import Answer, FakeDraft, faking
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    Tiers,
    both_tiers,
    orchestrating,
    whole,
)
from tests.stack import Output, Stack, eventually, request

pytestmark = pytest.mark.slow

PROMPT = [3, 1, 4, 1, 5]
NUM_TOKENS = 60


def _proposal(asked: Any, token_ids: list[int], **fields: Any) -> list[draft_pb2.Proposal]:
    """A proposal for the committed tokens; none for an open."""
    if not isinstance(asked, draft_pb2.DraftCommit):
        return []
    return [
        draft_pb2.Proposal(
            generation_id=asked.generation_id,
            base_len=asked.committed_len,
            token_ids=pack(token_ids, UINT32),
            **fields,
        )
    ]


def _support(token_ids: list[list[int]], weights: list[float]) -> dict[str, bytes]:
    return {
        "support_sizes": pack([len(ids) for ids in token_ids], UINT16),
        "support_ids": pack(np.concatenate(token_ids), UINT32),
        "support_probs": pack(weights, FLOAT32),
    }


async def _model_of(tiers: Tiers) -> model_pb2.ModelInfo:
    async with grpc.aio.insecure_channel(tiers.endpoints[0]) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        info_request = target_pb2.TargetServiceGetModelInfoRequest()
        return (await stub.GetModelInfo(info_request)).model


async def _with_fake(
    pair: Pair, redis_url: str, answer: Answer, sampling: dict[str, Any], **settings: Any
) -> tuple[Output, Output, FakeDraft]:
    """The output with that draft, the output without drafts, and the draft."""
    async with both_tiers(pair, draft_kv=None) as tiers:
        fake = FakeDraft(await _model_of(tiers), answer)
        async with (
            faking(fake) as endpoint,
            orchestrating(tiers, redis_url, draft_endpoint=endpoint, **settings) as stack,
        ):
            fields: dict[str, Any] = {"verification": sampling_pb2.VERIFICATION_COUPLED}
            sampling = {**sampling, "max_tokens": NUM_TOKENS, "seed": 5, "ignore_eos": True}
            drafted = await stack.generate(PROMPT, sampling=sampling, gamma=2, **fields)
            plain = await stack.generate(PROMPT, sampling=sampling, gamma=0, **fields)
            return drafted, plain, fake


WRONG: dict[str, Answer] = {
    "a token beyond the vocabulary": lambda asked: _proposal(asked, [70_000]),
    "too many tokens": lambda asked: _proposal(asked, [1] * 17),
    "no token": lambda asked: _proposal(asked, []),
    "a support where none belongs": lambda asked: _proposal(
        asked, [1], **_support([[1, 2]], [0.5, 0.5])
    ),
    "odd bytes": lambda asked: [
        draft_pb2.Proposal(generation_id=asked.generation_id, base_len=1, token_ids=b"abc")
    ],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_proposals_do_not_change_the_output(
    wrong: str, temperature: float, pair: Pair, redis_url: str
) -> None:
    """None is used, and the draft is not opened again."""
    drafted, plain, fake = await _with_fake(
        pair, redis_url, WRONG[wrong], {"temperature": temperature}, draft_wait_ms=200.0
    )
    assert drafted.token_ids == plain.token_ids
    assert drafted.speculation.num_draft_tokens == 0
    assert fake.num_opens == 1


async def test_random_proposals_do_not_change_the_output(pair: Pair, redis_url: str) -> None:
    """They are valid, so they are verified and rejected."""
    drafted, plain, _ = await _with_fake(
        pair, redis_url, lambda asked: _proposal(asked, [7, 9]), {"temperature": 1.0}
    )
    assert drafted.token_ids == plain.token_ids
    assert drafted.speculation.num_rejected_tokens > 0


async def test_a_draft_that_proposes_nothing_is_left(
    pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some rounds it gets no more commits."""
    monkeypatch.setattr(draft_link, "UNRESPONSIVE_AFTER_S", 0.0)
    drafted, plain, fake = await _with_fake(
        pair, redis_url, lambda _: [], {"temperature": 0.0}, draft_wait_ms=0.0
    )
    assert drafted.token_ids == plain.token_ids
    assert fake.num_commits < NUM_TOKENS - 20


async def _session(stack: Stack, name: str) -> orchestrator_pb2.GetSessionResponse:
    return await stack.client.GetSession(orchestrator_pb2.GetSessionRequest(session_id=name))


async def test_a_target_that_dies_loses_no_committed_token(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """The call ends UNAVAILABLE. The session has exactly the tokens that the client received."""
    shown = Output()
    async with both_tiers(pair, draft_kv=None) as tiers:
        target, _ = tiers.endpoints
        async with orchestrating(tiers, redis_url, target_wait_s=1.0) as stack:
            call = stack.client.Generate(
                request(PROMPT, {**GREEDY, "max_tokens": 1500}, session_id="s", create_session=True)
            )

            async def until_it_dies() -> None:
                async for chunk in call:
                    shown.add(chunk)
                    if len(shown.token_ids) > 20:
                        await tiers.target.grpc_server.stop(0)

            with pytest.raises(grpc.aio.AioRpcError) as error:
                await until_it_dies()
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "the target replica is lost" in (error.value.details() or "")
            assert target not in (error.value.details() or "")
            session = await _session(stack, "s")
            assert not session.in_use
    assert list(session.token_ids) == PROMPT + shown.token_ids
    assert shown.token_ids == greedy(PROMPT, len(shown.token_ids))


async def test_redis_that_stalls_in_the_last_round_loses_nothing(
    pair: Pair, greedy: Greedy, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client does not wait, the lease is released, and the session has every token."""
    monkeypatch.setattr(orchestrator.app, "StoreOptions", StoreOptions)  # default timeouts
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", 60.0)
    with RedisServer() as redis:
        pid = redis.pid
        assert pid is not None
        async with whole(pair, redis.url) as stack:
            fields = {"sampling": {**GREEDY, "max_tokens": 40}, "session_id": "s"}
            first = await stack.generate(PROMPT, create_session=True, **fields)
            brake.set(20)
            running = asyncio.create_task(stack.generate([9], **fields))
            num_tokens = len(PROMPT) + len(first.token_ids) + 1 + 20
            await eventually(lambda: _has_tokens(stack, "s", num_tokens))
            os.kill(pid, signal.SIGSTOP)
            try:
                brake.release()
                await asyncio.sleep(2.0)
            finally:
                os.kill(pid, signal.SIGCONT)
            second = await running
            await eventually(lambda: _is_free(stack, "s"))
            session = await _session(stack, "s")
    assert first.result is not None
    assert first.result.recorded
    context = [*PROMPT, *first.token_ids, 9]
    assert second.token_ids == greedy(context, 40)
    assert list(session.token_ids) == context + second.token_ids
    assert not session.in_use
    assert session.num_turns == 2


async def _is_free(stack: Stack, name: str) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        return not (await _session(stack, name)).in_use
    return False


async def _has_tokens(stack: Stack, name: str, num_tokens: int) -> bool:
    """Whether the generation runs and has that many tokens."""
    session = await _session(stack, name)
    return session.in_use and len(session.token_ids) >= num_tokens
