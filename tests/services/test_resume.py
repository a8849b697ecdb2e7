"""A broken stream is resumed at another orchestrator, after the tokens that its client has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import orchestrator.generation.generation
import orchestrator.generation.recorder
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    System,
    both_tiers,
    nothing_held,
    orchestrating,
    refusal,
)
from tests.stack import Output, eventually, request

PROMPT = list(range(20, 60))
NUM_TOKENS = 120
HOT: dict[str, Any] = {"temperature": 1.0, "seed": 7, "ignore_eos": True}


@contextlib.asynccontextmanager
async def two(pair: Pair, redis_url: str, **settings: Any) -> AsyncIterator[list[System]]:
    """Two orchestrators with the same tiers and Redis."""
    async with (
        both_tiers(pair) as tiers,
        orchestrating(tiers, redis_url, **settings) as first,
        orchestrating(tiers, redis_url, **settings) as second,
    ):
        yield [first, second]


def asked(sampling: dict[str, Any], **fields: Any) -> orchestrator_pb2.GenerateRequest:
    fields = {"gamma": 4, "session_id": "s", "create_session": True} | fields
    return request(PROMPT, {"max_tokens": NUM_TOKENS, **sampling}, **fields)


async def resume(system: System, num_received: int, session_id: str = "s") -> Output:
    output = Output()
    again = orchestrator_pb2.GenerateRequest(session_id=session_id, resume_from=num_received)
    async for chunk in system.client.Generate(again, timeout=200):
        output.add(chunk)
    return output


async def recorded(system: System) -> orchestrator_pb2.GetSessionResponse:
    return await system.client.GetSession(
        orchestrator_pb2.GetSessionRequest(session_id="s"), timeout=200
    )


async def some(call: Any, num_tokens: int) -> Output:
    """The first `num_tokens` tokens of a stream, or a few more."""
    output = Output()
    while len(output.token_ids) < num_tokens:
        output.add(await call.read())
    return output


async def test_a_long_output_is_sent_again_in_several_messages(
    pair: Pair, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator.generation.recorder, "MAX_CHUNK_TOKENS", 8)
    monkeypatch.setattr(orchestrator.generation.generation, "MAX_CHUNK_TOKENS", 8)
    async with two(pair, redis_url) as (first, second):
        before = await first.generate(
            PROMPT,
            sampling={**GREEDY, "max_tokens": NUM_TOKENS},
            session_id="s",
            create_session=True,
        )
        again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=3)
        chunks = [chunk async for chunk in second.client.Generate(again, timeout=200)]
    assert [len(chunk.token_ids) for chunk in chunks] == [8] * 14 + [5]
    assert before.token_ids[3:] == [i for chunk in chunks for i in chunk.token_ids]
    assert [chunk.HasField("result") for chunk in chunks] == [False] * 14 + [True]
    assert chunks[-1].result.usage.completion_tokens == NUM_TOKENS


COUPLED = {"verification": sampling_pb2.VERIFICATION_COUPLED}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "coupled": (HOT, COUPLED),
    "rejection": (HOT, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_a_turn_is_resumed_while_its_orchestrator_runs(
    way: str, pair: Pair, redis_url: str, brake: Brake
) -> None:
    """The second takes the session over. The first one's stream ends and writes nothing more."""
    sampling, fields = WAYS[way]
    async with two(pair, redis_url) as (first, second):
        whole = await first.generate(
            PROMPT, sampling={"max_tokens": NUM_TOKENS, **sampling}, gamma=0, **fields
        )
        brake.set(20)  # so it still runs when the second takes over
        call = first.client.Generate(asked(sampling, **fields), timeout=200)
        before = await some(call, 20)
        received = before.token_ids[:18]  # the last message never arrived
        epoch = (await recorded(second)).epoch
        resuming = asyncio.create_task(resume(second, len(received)))

        async def has_taken_over() -> bool:
            return (await recorded(second)).epoch > epoch

        await eventually(has_taken_over)
        brake.release()
        after = await resuming

        async def rest() -> None:
            while await call.read() is not grpc.aio.EOF:
                pass

        refused = await refusal(rest())
        assert refused.code is grpc.StatusCode.ABORTED
        assert len(received) + len(after.token_ids) == NUM_TOKENS
        if way != "rejection":
            assert received + after.token_ids == whole.token_ids
        got = await recorded(second)
        assert list(got.token_ids) == [*PROMPT, *received, *after.token_ids]
        assert not got.in_use
        assert after.result is not None
        assert after.result.recorded
        assert after.result.usage.completion_tokens == NUM_TOKENS


async def test_a_turn_is_resumed_after_its_client_left(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """A cancelled call leaves a turn that can be resumed, several times."""
    async with two(pair, redis_url) as (first, second):
        call = first.client.Generate(asked(GREEDY), timeout=200)
        received = (await some(call, 10)).token_ids
        call.cancel()
        again = second.client.Generate(
            orchestrator_pb2.GenerateRequest(session_id="s", resume_from=len(received)), timeout=200
        )
        received += (await some(again, 30)).token_ids
        again.cancel()
        received += (await resume(first, len(received))).token_ids
        assert received == greedy(PROMPT, NUM_TOKENS)
        # The conversation can be continued.
        more = await second.generate(
            [5, 6], sampling={**GREEDY, "max_tokens": 8}, session_id="s", gamma=2
        )
        assert more.token_ids == greedy([*PROMPT, *received, 5, 6], 8)


async def test_a_finished_turn_is_sent_again(pair: Pair, redis_url: str) -> None:
    """Its last message was lost: the missing tokens and the result."""
    async with two(pair, redis_url) as (first, second):
        done = await first.generate(
            PROMPT,
            sampling={**GREEDY, "max_tokens": 30},
            session_id="s",
            create_session=True,
        )
        for num_received in (30, 25, 0):
            resumed = await resume(second, num_received)
            assert resumed.token_ids == done.token_ids[num_received:]
            assert resumed.result is not None
            assert resumed.result.finish_reason == orchestrator_pb2.FINISH_REASON_LENGTH
            assert resumed.result.seed == done.result.seed if done.result else False


async def test_stop_strings_and_penalties_apply_to_a_resumed_turn(
    pair: Pair, redis_url: str
) -> None:
    """The output is the same as without an interruption."""
    sampling = {**HOT, "stop_token_ids": [3], "frequency_penalty": 0.5, "logit_bias": {3: 2.5}}
    async with two(pair, redis_url) as (first, second):
        whole = await first.generate(
            PROMPT, sampling={"max_tokens": NUM_TOKENS, **sampling}, gamma=0, **COUPLED
        )
        call = first.client.Generate(asked(sampling, **COUPLED), timeout=200)
        received = (await some(call, 5)).token_ids
        call.cancel()
        after = await resume(second, len(received))
        assert received + after.token_ids == whole.token_ids
        assert after.result is not None
        assert whole.result is not None
        assert after.result.stop_token_id == whole.result.stop_token_id


async def test_a_call_without_a_recorded_token_is_not_resumed(pair: Pair, redis_url: str) -> None:
    """The turn before it is not resumed in its place."""
    async with two(pair, redis_url) as (first, second):
        refused = await refusal(resume(second, 0, "nobody"))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        done = await first.generate(
            PROMPT, sampling={**GREEDY, "max_tokens": 5}, session_id="s", create_session=True
        )
        # A turn that fails before its first token.
        bad = request([1, 2], {"max_tokens": 10_000_000}, session_id="s")
        refused = await refusal(_all(first, bad))
        assert refused.fields == ["sampling.max_tokens"]
        refused = await refusal(resume(second, 0))
        assert refused.code is grpc.StatusCode.NOT_FOUND
        # A client with tokens means the turn that has some, also after a failed call.
        for num_received in (3, 5):
            assert (await resume(second, num_received)).token_ids == done.token_ids[num_received:]
        refused = await refusal(resume(second, 0))
        assert refused.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["DURABLE", "FAST"])
async def test_a_later_turn_is_begun_in_redis_before_a_token_is_sent(
    durability: str, pair: Pair, redis_url: str
) -> None:
    """Otherwise a resumption would send the turn before it."""
    mode = orchestrator_pb2.Durability.Value(f"DURABILITY_{durability}")
    async with two(pair, redis_url) as (first, _):
        await first.generate(PROMPT, sampling=GREEDY, session_id="s", create_session=True)
        sampling = {**GREEDY, "max_tokens": NUM_TOKENS}
        call = first.client.Generate(
            request([5], sampling, session_id="s", durability=mode), timeout=200
        )
        await some(call, 1)
        got = await recorded(first)
        assert got.num_turns == 2
        call.cancel()


async def _all(system: System, asked: orchestrator_pb2.GenerateRequest) -> None:
    async for _ in system.client.Generate(asked, timeout=200):
        pass


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"gamma": 4}, "gamma"),
        ({"create_session": True}, "create_session"),
        ({"text": "more"}, "text"),
        ({"sampling": {"seed": 1}}, "sampling"),
    ],
)
async def test_a_resumption_allows_no_other_field(
    fields: dict[str, Any], named: str, pair: Pair, redis_url: str
) -> None:
    async with two(pair, redis_url) as (first, _):
        again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=0, **fields)
        refused = await refusal(_all(first, again))
        assert refused.fields == [named]


async def test_a_client_may_have_more_tokens_than_are_recorded(pair: Pair, redis_url: str) -> None:
    """In mode fast. Identical tokens are generated again; otherwise it is refused."""
    async with two(pair, redis_url) as (first, second):
        done = await first.generate(
            PROMPT, sampling={**GREEDY, "max_tokens": 40}, session_id="s", create_session=True
        )
        refused = await refusal(resume(second, 41))
        assert refused.fields == ["resume_from"]
        assert len(done.token_ids) == 40


async def test_a_resumed_turn_leaves_nothing_at_the_tiers(pair: Pair, redis_url: str) -> None:
    async with two(pair, redis_url) as (first, second):
        call = first.client.Generate(asked(GREEDY), timeout=200)
        received = (await some(call, 10)).token_ids
        await resume(second, len(received))
        await second.client.DeleteSession(
            orchestrator_pb2.DeleteSessionRequest(session_id="s"), timeout=200
        )
        call.cancel()
        await eventually(lambda: nothing_held(second))


@pytest.mark.parametrize("durability", ["DURABLE", "FAST"])
async def test_both_durabilities_record_everything(
    durability: str, pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    mode = orchestrator_pb2.Durability.Value(f"DURABILITY_{durability}")
    async with two(pair, redis_url) as (first, _):
        output = await first.generate(
            PROMPT,
            sampling={**GREEDY, "max_tokens": 60},
            session_id="s",
            create_session=True,
            durability=mode,
        )
        assert output.token_ids == greedy(PROMPT, 60)
        assert output.result is not None
        assert output.result.recorded
        got = await recorded(first)
        assert list(got.token_ids) == [*PROMPT, *output.token_ids]
