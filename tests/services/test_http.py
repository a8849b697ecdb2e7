"""OpenAI-compatible HTTP: endpoints, errors, ids, by the official client and by hand."""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from orchestrator.generation.target_session import TargetSession
from outrider import __version__
from outrider.errors import InternalError
from outrider.redis.embedded import RedisServer
from outrider.runtime.grpc_options import MAX_REQUEST_BYTES
from outrider.tokenizer import Tokenizer
from tests.redis_fixture import redis_command
from tests.services.http_client import asked, events, get, openai_client, post
from tests.services.parts import CONTEXT_LEN, Brake, Greedy, Pair, System, nothing_held, whole
from tests.stack import eventually
from tests.telemetry.parts import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = list(b"the quick")
MESSAGES: Any = [{"role": "user", "content": "the fox"}]
RENDERED = list(b"[user]the fox\n[assistant]")
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
FIXED = {"ignore_eos": True, "gamma": 0}
NUM_TOKENS = 24
# The second as vLLM and guidellm.
USAGE: Any = {"include_usage": True, "continuous_usage_stats": True}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stack(chat_pair: Pair, redis_server: RedisServer) -> AsyncIterator[System]:
    """A stack with tokenizer, chat template and HTTP; Redis is empty at first."""
    redis_command(redis_server.url, "FLUSHALL")
    settings: dict[str, Any] = {"tokenizer": str(chat_pair.target), "metrics_vllm_names": True}
    async with whole(chat_pair, redis_server.url, http_port=0, **settings) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(stack: System) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(stack) as client:
        yield client


@pytest.fixture
def text(chat_pair: Pair, stack: System, chat_greedy: Greedy) -> Any:
    """The text after a prompt, by Hugging Face's own greedy decoding."""
    tokenizer = Tokenizer.load(str(chat_pair.target))
    assert tokenizer is not None

    def text(prompt: str, num_tokens: int = NUM_TOKENS) -> str:
        ids = tokenizer.encode(prompt)
        detokenizer = tokenizer.detokenizer(ids)
        parts = [detokenizer.push(token) for token in chat_greedy(ids, num_tokens)]
        return "".join(parts) + detokenizer.finish()

    return text


async def test_models_version_and_health(stack: System, client: openai.AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert (model.object, model.owned_by) == ("model", "outrider")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == CONTEXT_LEN
    assert (await client.models.retrieve(model.id)).id == model.id
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")
    assert await get(stack, "/version") == (200, {"version": __version__})
    assert await get(stack, "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("gamma", [0, 4])
async def test_a_completion_is_the_targets_own_text(
    gamma: int, client: openai.AsyncOpenAI, text: Any
) -> None:
    body: Any = {
        "model": "", "prompt": "the quick", "max_tokens": NUM_TOKENS, "temperature": 0,
        "extra_body": {"ignore_eos": True, "gamma": gamma, "draft_wait": "always"},
    }  # fmt: skip
    answer = await client.completions.create(**body)
    (choice,) = answer.choices
    assert choice.text == text("the quick")
    assert choice.finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.usage.total_tokens == NUM_TOKENS + answer.usage.prompt_tokens
    speculation = answer.model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]
    assert bool(speculation["num_draft_tokens"]) == bool(gamma)
    _has_vllms_shape(speculation)
    assert speculation["num_spec_tokens"] == gamma
    assert sum(speculation["acceptance_histogram"]) == speculation["num_spec_steps"]
    num_accepted = speculation["num_accepted_draft_tokens"]
    assert num_accepted == sum(j * n for j, n in enumerate(speculation["acceptance_histogram"]))
    streamed = await client.completions.create(**body, stream=True, stream_options=USAGE)
    chunks = [chunk async for chunk in streamed]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text
    assert [c.choices[0].finish_reason for c in chunks[-3:] if c.choices][-1] == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], answer.usage)
    so_far = [chunk.usage.completion_tokens for chunk in chunks[:-1] if chunk.usage]
    assert len(so_far) == len(chunks) - 1
    assert (so_far, so_far[-1]) == (sorted(so_far), NUM_TOKENS)
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]


def _has_vllms_shape(speculation: dict[str, Any]) -> None:
    """Asserts that each field of vLLM's has its type and range, as load tools read them."""
    assert type(speculation["mean_acceptance_length"]) is float
    assert type(speculation["draft_acceptance_rate"]) is float
    assert len(speculation["acceptance_histogram"]) == speculation["num_spec_tokens"] + 1


async def test_a_chat_is_the_targets_own_text(client: openai.AsyncOpenAI, text: Any) -> None:
    body: Any = {"model": "", "messages": MESSAGES, "max_completion_tokens": NUM_TOKENS, **GREEDY}
    answer = await client.chat.completions.create(**body)
    (choice,) = answer.choices
    assert choice.message.content == text(bytes(RENDERED).decode())
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    chunks = [c async for c in await client.chat.completions.create(**body, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas[:2]] == ["assistant", None]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    _has_vllms_shape(chunks[-1].model_extra["metrics"]["speculative_decoding"])  # type: ignore[index]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


_WRONG: dict[str, tuple[dict[str, Any], str | None]] = {
    "unknown": ({"temprature": 1}, "temprature"),
    "not implemented": ({"suffix": "x"}, "suffix"),
    "type": ({"temperature": "hot"}, "temperature"),
    "range": ({"temperature": -1}, "temperature"),
    "stop": ({"stop": [1, 2]}, "stop"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "no prompt": ({"prompt": None}, "prompt"),
    "mixed prompt": ({"prompt": ["a", 1]}, "prompt"),
    "token": ({"prompt": [1, 999]}, "prompt"),
    "too long": ({"prompt": [1] * (CONTEXT_LEN + 1)}, "prompt"),
    "max_tokens": ({"max_tokens": CONTEXT_LEN}, "max_tokens"),
    "n": ({"n": 0}, "n"),
    "many": ({"n": 128, "prompt": ["a"] * 9}, "prompt"),
    "session": ({"n": 2, "session_id": "s"}, "session_id"),
    "gamma": ({"gamma": 99}, "gamma"),
    "source": ({"draft_source": "lookup"}, "draft_source"),
    "enum": ({"verification": "exact"}, "verification"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "nested": ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    "bias": ({"logit_bias": {"999": 1.0}}, "logit_bias"),
    "infinite": ({"temperature": float("inf")}, "temperature"),
}


@pytest.mark.parametrize("case", _WRONG)
async def test_a_wrong_field_is_refused_by_name(case: str, stack: System) -> None:
    wrong, field = _WRONG[case]
    status, answer = await post(stack, "/v1/completions", {"prompt": "the", **wrong})
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["message"].startswith(f"{field}: ")


_WRONG_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "[user]", "content": ""}]}, "messages.role"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
}


@pytest.mark.parametrize("case", _WRONG_CHATS)
async def test_a_wrong_field_of_a_chat_is_refused_by_name(case: str, stack: System) -> None:
    wrong, field = _WRONG_CHATS[case]
    status, answer = await post(stack, "/v1/chat/completions", {"messages": MESSAGES, **wrong})
    assert (status, answer["error"]["param"]) == (400, field)


async def test_a_refused_request_is_counted(stack: System) -> None:
    async def num_refused() -> float:
        content = (await asked(stack.http_endpoint, "GET", "/metrics")).content.decode()
        assert "vllm:spec_decode_num_drafts_total" in content  # `vllm bench serve` reads it
        return Scrape(content)("outrider_requests_total", status="INVALID_ARGUMENT")

    before = await num_refused()
    await post(stack, "/v1/completions", {"prompt": "the", "temperature": -1})
    assert await num_refused() == before + 1


async def test_errors_of_the_transport_have_openais_shape(stack: System) -> None:
    for status, (found, answer) in {
        404: await get(stack, "/v1/nothing"),
        405: await get(stack, "/v1/completions"),
        400: await post(stack, "/v1/completions", b"{"),
        413: await post(stack, "/v1/completions", b" " * (MAX_REQUEST_BYTES + 1)),
    }.items():
        assert found == status
        assert answer["error"]["type"] == "invalid_request_error"


async def test_another_models_name_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="other", prompt="the")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_the_request_id_is_the_clients_or_a_new_one(client: openai.AsyncOpenAI) -> None:
    body: Any = {"model": "", "prompt": "the", "max_tokens": 1}
    ids = set()
    for headers in ({}, {}, {"X-Request-Id": "mine"}):
        answer = await client.completions.create(**body, extra_headers=headers)
        ids.add(answer._request_id)
        assert answer.id == f"cmpl-{answer._request_id}"
    assert len(ids) == 3
    assert "mine" in ids
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(**body, temperature=-1, extra_headers=headers)
    assert caught.value.request_id == "mine"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_closed_connection_frees_everything(
    stream: bool, stack: System, brake: Brake
) -> None:
    """In the middle of a round, which never ends: nothing waits for it."""
    brake.set(20)
    body = {"prompt": PROMPT, "max_tokens": 1_000, "ignore_eos": True, "stream": stream, "n": 2}
    host, _, port = stack.http_endpoint.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))

    async def runs() -> bool:
        return (await stack.target_load()).num_open_generations == 2

    await eventually(runs)
    connection.close()
    await eventually(lambda: nothing_held(stack))
    brake.release()


async def test_an_error_within_a_stream_is_its_last_event(
    stack: System, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, num = TargetSession.reply, 0

    async def fails(session: TargetSession) -> Any:
        nonlocal num
        num += 1
        if num == 3:
            raise InternalError("a defect", "its detail")
        return await reply(session)

    monkeypatch.setattr(TargetSession, "reply", fails)
    body = {"prompt": "the", "max_tokens": 90, "stream": True, **FIXED}
    *chunks, error, end = await events(stack, "/v1/completions", body)
    assert {json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks} == {None}
    assert json.loads(error)["error"]["code"] == "internal_error"
    assert "detail" not in error
    assert end == "[DONE]"
    num = 0
    with pytest.raises(openai.APIError):
        async for _ in await client.completions.create(
            model="",
            prompt="the",
            max_tokens=90,
            stream=True,
            extra_body={"gamma": 0, "ignore_eos": True},
        ):
            pass
    await eventually(lambda: nothing_held(stack))
