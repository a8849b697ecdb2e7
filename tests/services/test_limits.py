"""Limits of docs/reference/limits.md: an excess is rejected by name and harms nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from outrider.model_server import scheduler
from outrider.model_server import stream as peers
from outrider.redis.embedded import RedisServer
from outrider.runtime.grpc_options import MAX_REQUEST_BYTES
from outrider.runtime.grpc_streams import MAX_PENDING, Outbox
from outrider.v1 import draft_pb2, orchestrator_pb2, sampling_pb2, target_pb2
from tests.services.parts import (
    CONTEXT_LEN,
    GREEDY,
    Greedy,
    Pair,
    System,
    both_tiers,
    clients,
    nothing_held,
    refusal,
    whole,
)
from tests.services.streams import draft_commit, draft_open, ids, raw, row, sizes, target_open
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import eventually, request

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = [3, 1, 4, 1]
HUGE = 100_000
MANY_STOPS = sampling_pb2.SamplingParams(stop_token_ids=[1] * HUGE)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def tiers(pair: Pair) -> AsyncIterator[System]:
    async with both_tiers(pair) as tiers, clients(tiers) as system:
        yield system


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def chatty(
    chat_pair: Pair, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[System]:
    """A stack whose chat template raises an error that repeats the client's message."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, chat_template="{{ raise_exception(messages[0]['content']) }}")
    async with whole(chat_pair, redis_server.url, tokenizer=str(directory)) as stack:
        yield stack


TARGET_ITEMS: dict[str, tuple[str, Any]] = {
    "session_id": ("session_id: 193 characters; 1 to 192", {"session_id": "x" * 193}),
    "no session_id": ("session_id: 0 characters", {"session_id": ""}),
    "stop_token_ids": ("sampling.stop_token_ids: 100000 entries; at most", MANY_STOPS),
    "draft_token_ids": (
        "draft_token_ids: 100000 values; at most 16",
        row(2, 0, PROMPT, [1] * HUGE),
    ),
    "support_sizes": (
        "support_sizes: 100000 values; at most 16",
        row(2, 0, PROMPT, [1], support_sizes=sizes([1] * HUGE)),
    ),
    "support_ids": (
        "support_sizes: 5000 ids of one position; at most 4096",
        row(2, 0, PROMPT, [1], support_sizes=sizes([5000]), support_ids=ids([1] * 5000)),
    ),
}


@pytest.mark.parametrize("name", TARGET_ITEMS)
async def test_items_for_the_target(name: str, tiers: System) -> None:
    details, item = TARGET_ITEMS[name]
    frame = target_pb2.VerifyRequest(opens=[target_open(2)])
    if isinstance(item, target_pb2.VerifyRow):
        frame.rows.append(item)
    elif isinstance(item, dict):
        frame = target_pb2.VerifyRequest(opens=[target_open(2, **item)])
    else:
        frame = target_pb2.VerifyRequest(opens=[target_open(2, sampling=item)])
    async with raw(tiers.target.Verify()) as stream:
        await stream.write(frame)
        error = await stream.answer(2)
        assert error.reason == target_pb2.RowError.REASON_BAD_ROW
        assert details in error.detail
    await eventually(lambda: nothing_held(tiers))


DRAFT_ITEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "session_id": ("session_id: 193 characters; 1 to 192", {"session_id": "x" * 193}),
    "stop_token_ids": (
        "sampling.stop_token_ids: 100000 entries; at most",
        {"sampling": MANY_STOPS},
    ),
    "token_ids": (
        f"token_ids: 100000 values; at most {CONTEXT_LEN}",
        {"token_ids": ids([1] * HUGE)},
    ),
}


@pytest.mark.parametrize("name", [*DRAFT_ITEMS, "commit"])
async def test_items_for_the_draft(name: str, tiers: System) -> None:
    assert tiers.draft is not None
    details, fields = DRAFT_ITEMS.get(name, DRAFT_ITEMS["token_ids"])
    frame = draft_pb2.ProposeRequest(opens=[draft_open(2, PROMPT, **fields)])
    if name == "commit":
        frame = draft_pb2.ProposeRequest(
            opens=[draft_open(2, PROMPT)], commits=[draft_commit(2, [1] * HUGE, HUGE + 4)]
        )
    async with raw(tiers.draft.Propose()) as stream:
        await stream.write(frame)
        lost = await stream.answer(2)
        assert lost.reason == draft_pb2.DraftLost.REASON_BAD_MESSAGE
        assert details in lost.detail
    await eventually(lambda: nothing_held(tiers))


async def _end_of(call: Any, frame: Any) -> tuple[grpc.StatusCode, str]:
    """Final status of a stream after this frame."""
    await call.write(frame)
    async with asyncio.timeout(100):
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:  # the status follows the unread messages
                pass
        return await call.code(), await call.details()


async def test_frames_with_too_many_items(tiers: System) -> None:
    """The stream ends and its open generations are closed."""
    call = tiers.target.Verify()
    await call.write(target_pb2.VerifyRequest(opens=[target_open(1)]))
    closes = [target_pb2.TargetClose(generation_id=n) for n in range(20_000)]
    code, details = await _end_of(call, target_pb2.VerifyRequest(closes=closes))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "closes: 20000 items in one frame; at most 16384"
    await eventually(lambda: nothing_held(tiers))


async def test_frames_that_cannot_be_read(pair: Pair) -> None:
    """INVALID_ARGUMENT, not UNKNOWN with the name of a Python exception."""
    methods = ("TargetService/Verify", "DraftService/Propose")
    async with both_tiers(pair) as both:
        for address, method in zip(both.endpoints, methods, strict=True):
            async with grpc.aio.insecure_channel(str(address)) as channel:
                for data in (b"\xff", b"\x0a\x05abc", b"garbage" * 100):
                    call: Any = channel.stream_stream(f"/outrider.v1.{method}")()
                    code, details = await _end_of(call, data)
                    assert code is grpc.StatusCode.INVALID_ARGUMENT
                    assert details.startswith("frame: cannot be read")


async def test_open_generations_of_a_stream(tiers: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_OPEN_GENERATIONS", 3)
    async with raw(tiers.target.Verify()) as stream:
        opens = [target_open(n, max_len=16) for n in range(1, 5)]
        await stream.write(target_pb2.VerifyRequest(opens=opens))
        assert (
            "generation_id: 3 generations are open on this stream"
            in (await stream.answer(4)).detail
        )
        close = target_pb2.TargetClose(generation_id=1)
        await stream.write(target_pb2.VerifyRequest(closes=[close]))
        opening = target_open(5, max_len=16)
        frame = target_pb2.VerifyRequest(opens=[opening], rows=[row(5, 0, PROMPT)])
        await stream.write(frame)
        assert isinstance(await stream.answer(5), target_pb2.VerifyResult)
    await eventually(lambda: nothing_held(tiers))


async def test_streams_of_a_service(tiers: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_STREAMS", 2)
    async with raw(tiers.target.Verify()) as first, raw(tiers.target.Verify()) as second:
        for number, stream in enumerate((first, second), 1):
            await stream.write(target_pb2.VerifyRequest(rows=[row(number, 0, PROMPT)]))
            await stream.answer(number)
        refused = await refusal(anext(aiter(tiers.target.Verify())))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s is not None


async def test_a_stream_with_a_full_outbox_is_not_read() -> None:
    """Regression: a peer that sent bad requests and read no answers filled the replica's memory."""
    outbox: Outbox[int] = Outbox()
    outbox.put(range(MAX_PENDING - 1))
    await outbox.room()
    outbox.put([0])
    waiting = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert len(await anext(outbox.batches())) == MAX_PENDING
    async with asyncio.timeout(50):
        await waiting


@pytest.mark.slow
async def test_unread_answers_are_kept_until_they_are_read(tiers: System) -> None:
    """All answers arrive when the client finally reads."""
    call = tiers.target.Verify()
    num_frames, num_rows = 15, 5_000

    async def ask() -> None:
        for _ in range(num_frames):
            rows = [target_pb2.VerifyRow(generation_id=n) for n in range(num_rows)]
            await call.write(target_pb2.VerifyRequest(rows=rows))

    asking = asyncio.create_task(ask())
    await asyncio.wait([asking], timeout=0.5)
    num_answers = 0
    async with asyncio.timeout(100):
        async for frame in call:
            num_answers += len(frame.errors)
            if num_answers >= num_frames * num_rows:
                break
        await asking
    call.cancel()
    assert num_answers == num_frames * num_rows


def chat(*messages: tuple[str, str]) -> orchestrator_pb2.GenerateRequest:
    made = orchestrator_pb2.GenerateRequest()
    for role, content in messages:
        made.chat.messages.add(role=role, content=content)
    return made


def sampled(**fields: Any) -> orchestrator_pb2.GenerateRequest:
    return request([1], fields)


CALLS: dict[str, tuple[str, str, orchestrator_pb2.GenerateRequest]] = {
    "messages": ("chat", "at most 4096", chat(*[("user", "x")] * 4_097)),
    "role": ("chat.messages.role", "at most 64", chat(("r" * 65, "x"))),
    "content": ("chat", "at most 12288", chat(*[("user", "x" * 2_000_001)] * 2)),
    "text": ("text", "at most 12288", request("x" * 4_000_001)),
    "stop": ("sampling.stop", "at most 64", sampled(stop=["x"] * HUGE)),
    "stop text": ("sampling.stop", "1 to 1024", sampled(stop=["x" * HUGE])),
    "stop_token_ids": (
        "sampling.stop_token_ids",
        "at most 4096",
        sampled(stop_token_ids=[1] * HUGE),
    ),
    "logit_bias": (
        "sampling.logit_bias",
        "at most 1024",
        sampled(logit_bias=dict.fromkeys(range(5_000), 1.0)),
    ),
    "allowed_token_ids": (
        "sampling.allowed_token_ids",
        "at most 300",
        sampled(allowed_token_ids=[1] * HUGE),
    ),
    "logprobs": ("sampling.logprobs", "0 to 20", sampled(logprobs=21)),
    "token_ids": ("token_ids", f"1 to {CONTEXT_LEN}", request([1] * HUGE)),
    "session_id": ("session_id", "1 to 128", request([1], session_id="x" * HUGE)),
    "long answer": ("chat", "the chat template rejects it", chat(("user", "x" * 12_000))),
}


@pytest.mark.parametrize("name", CALLS)
async def test_requests_beyond_a_limit(name: str, chatty: System) -> None:
    """The error has the field and the limit; a message that repeats the input is cut."""
    field, allowed, bad = CALLS[name]
    refused = await refusal(anext(aiter(chatty.client.Generate(bad, timeout=200))))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == [field]
    assert allowed in refused.message
    assert len(refused.message) < 2_000


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"temperature": 1e-45, "logprobs": 20, "repetition_penalty": 10.0, "frequency_penalty": 2.0},
    {"temperature": 100.0, "top_p": 1e-45, "min_p": 1e-45, "top_k": 1},
    {"temperature": 1e-38, "repetition_penalty": 1e-30, "presence_penalty": -2.0},
    {"temperature": 0.0, "repetition_penalty": 1e-30, "logprobs": 5},
    {"temperature": 1.0, "repetition_penalty": 1e-30, "logit_bias": {7: 100.0, 8: -100.0}},
]


@pytest.mark.parametrize("sampling", EXTREMES)
async def test_extreme_sampling_numbers(sampling: dict[str, Any], chatty: System) -> None:
    """A former bug: float32 overflow became NaN. Warnings are errors here, on all threads."""
    for verification in (1, 2, 3):
        output = await chatty.generate(
            PROMPT,
            sampling={"max_tokens": 8, "ignore_eos": True, **sampling},
            verification=verification,
            gamma=4,
        )
        assert len(output.token_ids) == 8
        assert not any(math.isnan(token.logprob) for token in output.logprobs)


@pytest.mark.parametrize("sampling", EXTREMES)
async def test_draft_with_extreme_sampling_numbers(sampling: dict[str, Any], tiers: System) -> None:
    """A former bug: scores beyond float32 overflowed, and the generation was lost."""
    assert tiers.draft is not None
    asked = sampling_pb2.SamplingParams(**sampling)
    async with raw(tiers.draft.Propose()) as stream:
        for number, lookahead in itertools.product((1, 2, 3), (0, 1)):
            opening = draft_open(
                10 * number + lookahead,
                PROMPT,
                sampling=asked,
                verification=number,
                lookahead=lookahead,
                fan_out=4,
                gamma=4,
            )
            await stream.write(draft_pb2.ProposeRequest(opens=[opening]))
            answer = await stream.answer(opening.generation_id)
            assert isinstance(answer, draft_pb2.Proposal), answer
            if lookahead:
                commit = draft_commit(opening.generation_id, [9], len(PROMPT) + 1)
                await stream.write(draft_pb2.ProposeRequest(commits=[commit]))
                answer = await stream.answer(opening.generation_id)
                assert isinstance(answer, draft_pb2.Proposal), answer


async def test_penalty_below_the_smallest_allowed(chatty: System) -> None:
    bad = sampled(repetition_penalty=1e-40)
    refused = await refusal(anext(aiter(chatty.client.Generate(bad, timeout=200))))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ["sampling.repetition_penalty"]
    assert "is not in [1e-30, 10]" in refused.message


async def test_messages_that_are_too_large(chatty: System, chat_greedy: Greedy) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(chatty.endpoint, options=options) as channel:
        generate: Any = channel.unary_stream("/outrider.v1.OrchestratorService/Generate")
        refused = await refusal(anext(aiter(generate(bytes(MAX_REQUEST_BYTES + 1), timeout=200))))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    output = await chatty.generate([1, 2], sampling={**GREEDY, "max_tokens": 5})
    assert output.token_ids == chat_greedy([1, 2], 5)
