"""Fields of OpenAI-compatible HTTP: each means the same as over gRPC, streamed or not."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from outrider.redis.embedded import RedisServer
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.services.http_client import openai_client, post
from tests.services.parts import Pair, System, whole
from tests.stack import Output

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "the quick"
NUM_TOKENS = 24
COUPLED = {"verification": "coupled", "draft_wait": "always"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stack(chat_pair: Pair, redis_server: RedisServer) -> AsyncIterator[System]:
    settings: dict[str, Any] = {"tokenizer": str(chat_pair.target), "http_port": 0}
    settings |= {"served_model_name": "small, tiny", "prompt_lookup": True}
    async with whole(chat_pair, redis_server.url, **settings) as stack:
        yield stack


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(stack: System) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai_client(stack) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(chat_pair: Pair) -> Tokenizer:
    tokenizer = Tokenizer.load(str(chat_pair.target))
    assert tokenizer is not None
    return tokenizer


async def over_grpc(stack: System, prompt: Any = PROMPT, **sampling: Any) -> Output:
    sampling.setdefault("max_tokens", NUM_TOKENS)
    return await stack.generate(
        prompt, sampling=sampling, verification=sampling_pb2.VERIFICATION_COUPLED, gamma=0
    )


# Names of `SamplingParams`; all with a seed, so that `coupled` outputs are equal.
_FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed": {"seed": 7},
    "temperature": {"temperature": 0.7, "seed": 1},
    "top_p": {"top_p": 0.35, "seed": 2},
    "top_k": {"top_k": 3, "seed": 3},
    "min_p": {"min_p": 0.3, "seed": 4},
    "presence": {"presence_penalty": 1.5, "seed": 5},
    "frequency": {"frequency_penalty": 1.1, "seed": 6},
    "repetition": {"repetition_penalty": 1.3, "seed": 7},
    "bias": {"logit_bias": {ord("a"): 7.3, ord("b"): 7.1}, "seed": 8},
    "allowed": {"allowed_token_ids": [ord("a"), ord("b")], "seed": 9},
    "stop token": {"stop_token_ids": [ord("b")], "allowed_token_ids": [*b"aaab"], "seed": 10},
    "stop": {"stop": ["ba"], "allowed_token_ids": [*b"ab"], "seed": 11},
    "min_tokens": {"stop": ["a"], "allowed_token_ids": [*b"ab"], "min_tokens": 9, "seed": 12},
    "max_tokens": {"max_tokens": 3, "seed": 13},
    "ignore_eos": {"ignore_eos": True, "temperature": 1.5, "seed": 14},
}
_OPENAIS = (
    "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop", "max_tokens",
)  # fmt: skip


@pytest.mark.parametrize("case", _FIELDS)
async def test_a_field_means_the_same_as_over_grpc(
    case: str, stack: System, client: openai.AsyncOpenAI
) -> None:
    """Without drafts over gRPC; with drafts, streamed and whole, over HTTP."""
    fields = _FIELDS[case]
    expected = await over_grpc(stack, **fields)
    assert expected.result is not None
    given = {name: value for name, value in fields.items() if name in _OPENAIS}
    extra = {name: value for name, value in fields.items() if name not in _OPENAIS}
    asked: Any = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        **given,
        "extra_body": {**extra, **COUPLED, "gamma": 4},
    }
    answer = await client.completions.create(**asked)
    chunks = [c async for c in await client.completions.create(**asked, stream=True)]
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    last = chunks[-1].choices[0]
    reason = orchestrator_pb2.FinishReason.Name(expected.result.finish_reason)
    for one in (choice, last):
        assert f"FINISH_REASON_{one.finish_reason.upper()}" == reason
    stop = expected.result.stop_text or None
    if expected.result.HasField("stop_token_id"):
        stop = expected.result.stop_token_id
    assert choice.model_extra == {"stop_reason": stop}
    assert answer.model == "tiny"


async def test_prompts_as_text_lists_and_token_ids(
    stack: System, client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    """Choices are in the order of the prompts; each prompt's tokens are counted once."""
    ids = tokenizer.encode(PROMPT)
    prompts: list[Any] = [PROMPT, [PROMPT, "fox"], ids, [ids, tokenizer.encode("fox")]]
    texts = [(await over_grpc(stack, one, temperature=0)).text for one in (PROMPT, "fox")]
    for prompt in prompts:
        asked: Any = {"model": "", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = await client.completions.create(**asked, n=2)
        num = len(answer.choices) // 2
        assert [choice.index for choice in answer.choices] == list(range(2 * num))
        assert [choice.text for choice in answer.choices] == [t for t in texts[:num] for _ in "nn"]
        assert answer.usage is not None
        num_prompt = len(ids) if num == 1 else len(ids) + len(tokenizer.encode("fox"))
        assert answer.usage.prompt_tokens == num_prompt
        assert answer.usage.completion_tokens == 2 * num * NUM_TOKENS
        streamed = ["" for _ in range(2 * num)]
        async for chunk in await client.completions.create(**asked, n=2, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in answer.choices]


async def test_choices_of_a_seeded_request_have_successive_seeds(
    stack: System, client: openai.AsyncOpenAI
) -> None:
    answer = await client.completions.create(
        model="", prompt=PROMPT, max_tokens=NUM_TOKENS, seed=2**64 - 2, n=3, extra_body=COUPLED
    )
    seeds = (2**64 - 2, 2**64 - 1, 0)
    expected = [(await over_grpc(stack, seed=seed)).text for seed in seeds]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 3


async def test_logprobs_of_completions(stack: System, client: openai.AsyncOpenAI) -> None:
    expected = await over_grpc(stack, temperature=0, logprobs=2)
    asked: Any = {"model": "", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = await client.completions.create(**asked, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert [round(value, 4) for value in logprobs.token_logprobs] == [
        round(one.logprob, 4) for one in expected.logprobs
    ]
    for token, tops in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert 2 <= len(tops) <= 3
        assert token in tops
    lengths = [1 if token.startswith("bytes:") else len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [sum(lengths[:i]) for i in range(NUM_TOKENS)]
    streamed: list[Any] = []
    async for chunk in await client.completions.create(**asked, logprobs=2, stream=True):
        part = chunk.choices[0].logprobs
        assert part is not None
        streamed += zip(part.tokens or (), part.text_offset or (), strict=True)
    assert streamed == list(zip(logprobs.tokens, logprobs.text_offset, strict=True))


async def test_logprobs_of_chats(client: openai.AsyncOpenAI) -> None:
    asked: Any = {
        "model": "", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0,
        "max_tokens": NUM_TOKENS, "logprobs": True,
    }  # fmt: skip
    answer = await client.chat.completions.create(**asked, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == NUM_TOKENS
    for entry in content:
        assert len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]
        assert (best.token, best.bytes, best.logprob) == (entry.token, entry.bytes, entry.logprob)
        assert bytes(entry.bytes or ()).decode(errors="replace") == entry.token
        assert math.exp(entry.logprob) <= 1
    whole = b"".join(bytes(entry.bytes or ()) for entry in content)
    assert whole.decode(errors="replace") == answer.choices[0].message.content
    chunks = [c async for c in await client.chat.completions.create(**asked, stream=True)]
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]
    assert not any(entry.top_logprobs for entry in streamed)


async def test_echo_puts_the_prompt_before_the_output(
    stack: System, client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    text = (await over_grpc(stack, temperature=0)).text
    for prompt in (PROMPT, tokenizer.encode(PROMPT)):
        asked: Any = {"model": "", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = await client.completions.create(**asked, echo=True)
        assert answer.choices[0].text == PROMPT + text
        chunks = await client.completions.create(**asked, echo=True, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in chunks]) == PROMPT + text


async def test_sessions_continue_over_both_transports(
    stack: System, client: openai.AsyncOpenAI
) -> None:
    turn: Any = {"model": "", "max_tokens": 6, "temperature": 0}
    session: Any = {"session_id": "h-1", "draft_source": "lookup", "priority": 3}
    first = await client.completions.create(
        **turn, prompt=PROMPT, extra_body={**session, "create_session": True}
    )
    second = await client.completions.create(**turn, prompt=" fox", extra_body=session)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 0
    recorded = await stack.client.GetSession(orchestrator_pb2.GetSessionRequest(session_id="h-1"))
    assert recorded.num_turns == 2
    whole_text = PROMPT + first.choices[0].text + " fox" + second.choices[0].text
    tokens = await post(stack, "/detokenize", {"tokens": list(recorded.token_ids)})
    assert tokens == (200, {"prompt": whole_text})
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(**turn, prompt="x", extra_body={"session_id": "h-2"})


async def test_token_details_give_text_origin_and_round(stack: System) -> None:
    body = {
        "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
        "gamma": 3, "draft_wait": "always", "token_details": True,
    }  # fmt: skip
    status, answer = await post(stack, "/v1/completions", body)
    assert status == 200
    (choice,) = answer["choices"]
    details = choice["token_details"]
    assert "".join(one["text"] for one in details) == choice["text"]
    rounds = [one["round"] for one in details]
    num_rounds = answer["metrics"]["speculative_decoding"]["num_rounds"]
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(num_rounds))
    num_accepted = sum(one["origin"] == "accepted" for one in details)
    speculation = answer["metrics"]["speculative_decoding"]
    assert num_accepted == speculation["num_accepted_draft_tokens"]
    of_rounds = {one["round"]: (one["num_draft_tokens"], one["draft_source"]) for one in details}
    assert sum(num for num, _ in of_rounds.values()) == speculation["num_draft_tokens"]
    assert all((source == "none") == (num == 0) for num, source in of_rounds.values())


async def test_tokenize_and_detokenize(stack: System, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    status, answer = await post(stack, "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert (status, answer["tokens"], answer["count"]) == (200, ids, len(ids))
    assert "".join(answer["token_strs"]) == PROMPT
    messages = [{"role": "user", "content": PROMPT}]
    status, chat = await post(stack, "/tokenize", {"messages": messages})
    assert status == 200
    assert chat["tokens"] == tokenizer.encode(f"[user]{PROMPT}\n[assistant]")
    assert await post(stack, "/detokenize", {"tokens": ids}) == (200, {"prompt": PROMPT})
    for path, body, field in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [999]}, "tokens"),
    ):
        status, refused = await post(stack, path, body)
        assert status in (400, 404)
        assert refused["error"]["param"] == field


async def test_labels_and_neutral_values_are_accepted(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": "a"}], max_completion_tokens=1,
        user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        response_format={"type": "text"}, modalities=["text"], safety_identifier="s",
        prompt_cache_key="k", n=1, logit_bias={}, stop=None,
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


async def test_content_parts_and_tool_messages_reach_the_template(
    stack: System, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]
    _, answer = await post(stack, "/tokenize", {"messages": messages})
    assert tokenizer.decode(answer["tokens"]) == "[user]a\nb\n[tool]c\n[assistant]"
    messages[0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    status, answer = await post(stack, "/v1/chat/completions", {"messages": messages})
    assert status == 400
    assert answer["error"]["param"].startswith("messages.0.content")


_TOOLS: Any = [{"type": "function", "function": {"name": "weather"}}]


async def test_formats_that_contradict_are_refused(stack: System) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    formats = {"response_format": {"type": "json_object"}}
    for fields, named in (
        ({**formats, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({**formats, "tools": _TOOLS, "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"tools": _TOOLS}, "tool_choice"),
    ):
        status, answer = await post(stack, "/v1/chat/completions", {"messages": messages, **fields})
        assert (status, answer["error"]["param"]) == (400, named)


async def test_echo_with_logprobs_scores_the_prompt(
    stack: System, client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    """As evaluation harnesses score texts: each token of the prompt given those before it."""
    ids = tokenizer.encode(PROMPT + " fox")
    asked: Any = {"model": "", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    answer = await client.completions.create(**asked, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert logprobs.token_logprobs[0] is None
    assert "".join(logprobs.tokens[: len(ids)]) == PROMPT + " fox"
    for index in range(1, len(ids)):
        biased = await over_grpc(
            stack, ids[:index], temperature=0, logprobs=1, max_tokens=1,
            allowed_token_ids=[ids[index]],
        )  # fmt: skip
        expected = biased.logprobs[0].logprob
        assert logprobs.token_logprobs[index] == pytest.approx(expected, abs=1e-4)
    status, body = await post(
        stack, "/v1/completions", {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
    )
    assert status == 200
    entries = body["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    for token_id, entry, value in zip(
        ids[1:], entries[1:], logprobs.token_logprobs[1:], strict=False
    ):
        own = entry[str(token_id)]
        assert own["logprob"] == pytest.approx(value, abs=1e-4)
        (best,) = (one for one in entry.values() if one["rank"] == 1)
        assert (own["rank"] == 1) == (own == best)
        assert 1 <= own["rank"] <= 257
