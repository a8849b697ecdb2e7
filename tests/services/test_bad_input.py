"""Invalid requests over gRPC: refused with the field's name, and nothing is left of them.

The rules themselves are tested in tests/orchestrator/generation/test_validation.py.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from orchestrator.api import grpc_server
from orchestrator.api.grpc_request import parse_request
from orchestrator.generation.validation import ValidRequest
from outrider.redis.embedded import RedisServer
from outrider.runtime.protobuf import LONG_LIST
from outrider.v1 import orchestrator_pb2
from tests.redis_fixture import redis_command
from tests.services.parts import (
    CONTEXT_LEN,
    GREEDY,
    Brake,
    Greedy,
    Pair,
    Refusal,
    System,
    both_tiers,
    nothing_held,
    orchestrating,
    refusal,
    whole,
)
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import eventually, request

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [1, 2, 3]
VOCAB_SIZE = 256
EOS = VOCAB_SIZE - 1


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def plain(pair: Pair, redis_server: RedisServer) -> AsyncIterator[System]:
    """A stack without a tokenizer; Redis is empty at first."""
    redis_command(redis_server.url, "FLUSHALL")
    async with whole(pair, redis_server.url) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def chatty(chat_pair: Pair, redis_server: RedisServer) -> AsyncIterator[System]:
    """A stack with tokenizer and chat template."""
    async with whole(chat_pair, redis_server.url, tokenizer=str(chat_pair.target)) as stack:
        yield stack


def asked(**sampling: Any) -> orchestrator_pb2.GenerateRequest:
    return request(PROMPT, {"max_tokens": 4, **sampling})


def with_fields(**fields: Any) -> orchestrator_pb2.GenerateRequest:
    return request(PROMPT, {"max_tokens": 4}, **fields)


def chat(*messages: tuple[str, str]) -> orchestrator_pb2.GenerateRequest:
    made = orchestrator_pb2.GenerateRequest()
    made.chat.SetInParent()
    for role, content in messages:
        made.chat.messages.add(role=role, content=content)
    return made


def unset() -> orchestrator_pb2.GenerateRequest:
    return orchestrator_pb2.GenerateRequest()


async def refused_by(stack: System, bad: orchestrator_pb2.GenerateRequest) -> Refusal:
    """Sends an invalid request; returns its refusal and checks that it left nothing open."""
    refused = await refusal(anext(aiter(stack.client.Generate(bad, timeout=200))))
    load = await stack.target_load()
    assert load.num_open_generations == 0
    return refused


EMPTY: list[tuple[str, orchestrator_pb2.GenerateRequest]] = [
    ("input", unset()),
    ("token_ids", request([], {"max_tokens": 4})),
    ("token_ids", request([1, VOCAB_SIZE, 2])),
    ("token_ids", request([2**32 - 1])),
    ("text", request("no tokenizer")),
    ("chat", chat(("user", "no tokenizer"))),
]
SAMPLING: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": math.nan}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": -0.5}),
    ("min_p", {"min_p": math.nan}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": CONTEXT_LEN}),
    ("max_tokens", {"max_tokens": 2**32 - 1}),
    ("min_tokens", {"min_tokens": 5}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -math.inf}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("logit_bias", {"logit_bias": {1: 100.5}}),
    ("logit_bias", {"logit_bias": {1: math.nan}}),
    ("logit_bias", {"logit_bias": {VOCAB_SIZE: 1.0}}),
    ("logprobs", {"logprobs": 21}),
    ("stop", {"stop": ["no tokenizer"]}),
    ("stop_token_ids", {"stop_token_ids": [VOCAB_SIZE]}),
    ("allowed_token_ids", {"allowed_token_ids": [1, VOCAB_SIZE]}),
    ("allowed_token_ids", {"allowed_token_ids": [EOS], "min_tokens": 1}),
    ("allowed_token_ids", {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 2}),
]
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("gamma", {"gamma": 17}),
    ("gamma", {"gamma": 2**32 - 1}),
    ("lookahead", {"lookahead": 5}),
    ("fan_out", {"fan_out": 0}),
    ("fan_out", {"fan_out": 65}),
    ("verification", {"verification": 9}),
    ("session_id", {"session_id": "a b", "create_session": True}),
    ("session_id", {"session_id": "{x}", "create_session": True}),
    ("session_id", {"session_id": "x" * 129, "create_session": True}),
    ("create_session", {"create_session": True}),
]


def _names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{field}-{number}" for number, (field, _) in enumerate(cases)]


@pytest.mark.parametrize(("field", "bad"), EMPTY, ids=_names(EMPTY))
async def test_invalid_prompts(
    field: str, bad: orchestrator_pb2.GenerateRequest, plain: System
) -> None:
    refused = await refused_by(plain, bad)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [field]
    assert field in refused.message


@pytest.mark.parametrize(("field", "sampling"), SAMPLING, ids=_names(SAMPLING))
async def test_invalid_sampling(field: str, sampling: dict[str, Any], plain: System) -> None:
    refused = await refused_by(plain, asked(**sampling))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [f"sampling.{field}"]
    assert f"sampling.{field}" in refused.message


@pytest.mark.parametrize(("field", "fields"), FIELDS, ids=_names(FIELDS))
async def test_invalid_fields(field: str, fields: dict[str, Any], plain: System) -> None:
    refused = await refused_by(plain, with_fields(**fields))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [field]
    assert field in refused.message


@pytest.mark.parametrize("num_tokens", [CONTEXT_LEN, CONTEXT_LEN + 1, 1_000_000])
async def test_prompt_longer_than_the_context(num_tokens: int, plain: System) -> None:
    """It is refused with the prompt's field, and the session is not created."""
    bad = request([1] * num_tokens, {"max_tokens": 1}, session_id="long", create_session=True)
    refused = await refused_by(plain, bad)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["token_ids"]
    assert str(CONTEXT_LEN) in refused.message
    missing = plain.client.GetSession(orchestrator_pb2.GetSessionRequest(session_id="long"))
    assert (await refusal(missing)).code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("num_ids", "is_long"), [(LONG_LIST + 1, True), (300, False)])
async def test_long_lists_are_validated_in_a_thread(
    num_ids: int, is_long: bool, plain: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*arguments: Any) -> ValidRequest:
        threads.append(threading.current_thread().name)
        return parse_request(*arguments)

    monkeypatch.setattr(grpc_server, "parse_request", noted)
    refused = await refused_by(plain, asked(allowed_token_ids=[1] * num_ids))
    assert refused.fields == ["sampling.allowed_token_ids"]
    event_loop = threading.current_thread().name
    assert [name != event_loop for name in threads] == [is_long]


async def test_invalid_prompts_with_a_tokenizer(chatty: System) -> None:
    for field, bad in (
        ("text", request("")),
        ("chat", chat()),
        ("chat.messages.role", chat(("", "hello"))),
        ("token_ids", request([300])),
        ("sampling.stop", request("x", {"stop": [""]})),
        ("sampling.stop", request("x", {"stop": ["x" * 1025]})),
        ("sampling.stop", request("x", {"stop": ["a"] * 65})),
    ):
        refused = await refused_by(chatty, bad)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == [field]
    output = await chatty.generate("the quick", sampling={**GREEDY, "max_tokens": 5})
    assert len(output.token_ids) == 5


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no such role') }}", ""])
async def test_error_of_a_chat_template_is_an_invalid_request(
    template: str | None, chat_pair: Pair, redis_server: RedisServer, tmp_path: Any
) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    async with whole(chat_pair, redis_server.url, tokenizer=str(tmp_path)) as stack:
        refused = await refused_by(stack, chat(("user", "hello")))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["chat"]


async def test_invalid_session_ids_in_all_methods(plain: System) -> None:
    for call in (
        plain.client.GetSession(orchestrator_pb2.GetSessionRequest(session_id="a b")),
        plain.client.GetSession(orchestrator_pb2.GetSessionRequest()),
        plain.client.DeleteSession(orchestrator_pb2.DeleteSessionRequest(session_id="{}")),
    ):
        refused = await refusal(call)
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["session_id"]


async def test_nothing_is_left_of_refused_requests(
    plain: System, redis_server: RedisServer, greedy: Greedy
) -> None:
    """After the tests above and many refusals at a time. Runs after them in this module."""
    bad = [asked(top_p=0.0), with_fields(gamma=99), request([999]), unset()] * 20
    refusals = await asyncio.gather(*(refused_by(plain, one) for one in bad))
    assert {refused.code for refused in refusals} == {grpc.StatusCode.INVALID_ARGUMENT}
    await eventually(lambda: nothing_held(plain))
    assert redis_command(redis_server.url, "DBSIZE") == b":0"
    output = await plain.generate(PROMPT, sampling={**GREEDY, "max_tokens": 12})
    assert output.token_ids == greedy(PROMPT, 12)


async def test_extreme_values_that_are_allowed(plain: System, greedy: Greedy) -> None:
    """Requests at the limits are served."""
    for sampling in (
        {"temperature": 0, "ignore_eos": True, "min_tokens": 4},
        {"temperature": 100.0, "top_p": 1e-6, "min_p": 1.0, "top_k": 2**31 - 1, "seed": 2**64 - 1},
        {"temperature": 1e-30, "logprobs": 20, "presence_penalty": -2, "repetition_penalty": 1e-3},
        {"logit_bias": {EOS: 100.0, 0: -100.0}, "min_tokens": 3},
        {"allowed_token_ids": [EOS, 3], "min_tokens": 4},
        {"allowed_token_ids": [3], "repetition_penalty": 10.0, "frequency_penalty": 2},
    ):
        for verification in (1, 2, 3):
            output = await plain.generate(
                PROMPT, sampling={"max_tokens": 4, **sampling}, verification=verification
            )
            assert 1 <= len(output.token_ids) <= 4
            assert all(0 <= token_id < VOCAB_SIZE for token_id in output.token_ids)
    last = [1] * (CONTEXT_LEN - 1)
    output = await plain.generate(last, sampling={**GREEDY, "max_tokens": 1}, gamma=16)
    assert output.token_ids == greedy(last, 1)


async def test_requests_without_kv_room(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """INVALID_ARGUMENT if the request never fits, RESOURCE_EXHAUSTED if it does not fit now."""
    async with (
        both_tiers(pair, target_kv=256) as tiers,
        orchestrating(tiers, redis_url, max_waiting=0) as stack,
    ):
        refused = await refused_by(stack, request([1] * 200, {"max_tokens": 57}))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["sampling.max_tokens"]
        brake.set(1)  # it must still run when the other one is refused
        long = [1] * 200
        running = stack.client.Generate(request(long, {**GREEDY, "max_tokens": 50}), timeout=200)
        stream = aiter(running)
        received = list((await anext(stream)).token_ids)
        bad = request([2] * 100, {"max_tokens": 9}, session_id="s", create_session=True)
        refused = await refusal(anext(aiter(stack.client.Generate(bad, timeout=200))))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s is not None
        assert refused.retry_after_s > 0
        brake.release()
        async for chunk in stream:
            received += chunk.token_ids
        assert received == greedy(long, 50), "the running request is undisturbed"
        await eventually(lambda: nothing_held(stack))
        missing = stack.client.GetSession(orchestrator_pb2.GetSessionRequest(session_id="s"))
        assert (await refusal(missing)).code is grpc.StatusCode.NOT_FOUND, "not created"


async def test_too_many_generations(pair: Pair, redis_server: RedisServer, brake: Brake) -> None:
    brake.set(1)
    async with whole(pair, redis_server.url, max_generations=2, max_waiting=0) as stack:
        calls = [
            stack.client.Generate(request([n], {**GREEDY, "max_tokens": 1_500}), timeout=200)
            for n in range(2)
        ]
        for call in calls:
            await anext(aiter(call))
        refused = await refusal(anext(aiter(stack.client.Generate(asked(), timeout=200))))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s is not None
        for call in calls:
            call.cancel()
        await eventually(lambda: nothing_held(stack))
        brake.release()

        async def is_served() -> bool:
            """The admission queue has room a moment after the replicas are free."""
            try:
                output = await stack.generate(PROMPT, sampling={**GREEDY, "max_tokens": 4})
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
                return False
            return len(output.token_ids) == 4

        await eventually(is_served)
