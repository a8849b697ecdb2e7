"""Tool calls that the model chooses to make (`tool_choice: auto`), over HTTP.

The tokenizer has the tags of calls as tokens, as Qwen's. A bias makes a random model choose them:
often it calls, writes text, calls again or ends.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio
import tokenizers

from tests.e2e import byte_tokenizer
from tests.e2e.byte_tokenizer import EOS
from tests.services.http_client import openai_client
from tests.stack import running_stack
from tests.tiny_models import make_tiny_draft, make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

BEGIN, END = EOS + 1, EOS + 2
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "day": {"type": "integer", "maximum": 9}},
        "required": ["unit"],
        "additionalProperties": False,
    },
    "time": {"type": "object", "additionalProperties": False},
}
SEEDS = (0, 2, 3, 5, 7, 8)
MAX_TOKENS = 130
# Printable ASCII, the tags and EOS; others, spaces and line breaks only where they must be.
_BIAS = {i: -100 for i in range(EOS) if not 32 < i < 127 or i == ord("<")} | {BEGIN: 10, EOS: 8}
FIELDS: dict[str, Any] = {
    "model": "",
    "messages": [{"role": "user", "content": "The answer: "}],
    "max_tokens": MAX_TOKENS,
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in SCHEMAS.items()
    ],
    "logit_bias": {str(token_id): bias for token_id, bias in _BIAS.items()},
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(
    redis: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[openai.AsyncOpenAI]:
    directory = tmp_path_factory.mktemp("tools")
    (directory / "chat.jinja").write_text(TEMPLATE, "utf-8")
    target = make_tiny_model(
        "llama", directory / "target", scale=0.5, vocab_size=END + 1, eos_token_id=EOS
    )
    draft = make_tiny_draft(target, directory / "draft", noise=0.05)
    for model in (target, draft):
        _write_tokenizer(model)
    async with (
        running_stack(
            target, draft, redis, tokenizer=str(target),
            chat_template=str(directory / "chat.jinja"), http_port=0,
        ) as stack,
        openai_client(stack) as client,
    ):  # fmt: skip
        yield client


def _write_tokenizer(directory: Path) -> None:
    path = byte_tokenizer.add_byte_tokenizer(directory) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_tokens([tokenizers.AddedToken(each) for each in ("<tool_call>", "</tool_call>")])
    assert backend.token_to_id("</tool_call>") == END
    backend.save(str(path))


Answer = tuple[str, list[tuple[str, str]], str]


async def whole(client: openai.AsyncOpenAI, seed: int, gamma: int, **fields: Any) -> Answer:
    answer = await client.chat.completions.create(**_fields(seed, gamma), **fields)
    (choice,) = answer.choices
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.type == "function" for call in calls)
    named: Any = [(call.function.name, call.function.arguments) for call in calls]  # type: ignore[union-attr]
    return choice.message.content or "", named, choice.finish_reason


async def streamed(client: openai.AsyncOpenAI, seed: int, gamma: int) -> Answer:
    """Text and calls come before the last chunk, which may have more of them."""
    content, reason = "", None
    calls: list[tuple[str, str]] = []
    async for chunk in await client.chat.completions.create(**_fields(seed, gamma), stream=True):
        (choice,) = chunk.choices
        assert reason is None
        reason, delta = choice.finish_reason, choice.delta
        content += delta.content or ""
        for call in delta.tool_calls or ():
            assert (call.index, call.type) == (len(calls), "function")
            assert call.id
            assert call.function is not None
            calls.append((call.function.name or "", call.function.arguments or ""))
    assert reason is not None
    return content, calls, reason


def _fields(seed: int, gamma: int) -> dict[str, Any]:
    extra = {"gamma": gamma, "draft_wait": "always", "verification": "coupled"}
    return {**FIELDS, "seed": seed, "extra_body": extra}


async def test_one_call_ends_an_answer_without_parallel_calls(client: openai.AsyncOpenAI) -> None:
    for seed in (7, 8):
        content, calls, reason = await whole(client, seed, 4, parallel_tool_calls=False)
        several = (await whole(client, seed, 4))[1]
        assert len(several) > 1
        assert (calls, reason) == (several[:1], "tool_calls")
        assert "tool_call" not in content


async def test_calls_that_the_model_chooses(client: openai.AsyncOpenAI) -> None:
    """Whole and streamed, with drafts and without: the same text, calls and end.

    Arguments keep the schema of their function. Among the answers are some with several calls, with
    text before a call, without a call, and one that ends within a call.
    """
    seen = set()
    for seed in SEEDS:
        expected = await whole(client, seed, 0)
        assert await whole(client, seed, 4) == expected
        assert await streamed(client, seed, 4) == expected
        content, calls, reason = expected
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert reason == "length" or reason == ("tool_calls" if calls else "stop")
        if reason != "length":
            assert "tool_call" not in content
        elif "<tool_call>" in content:
            seen.add("cut off")
        text = content.partition("<tool_call>")[0]
        seen.add(("text " if text else "") + str(min(len(calls), 2)))
    assert seen >= {"0", "text 1", "text 2", "cut off"}
