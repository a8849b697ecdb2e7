"""Formats of answers over HTTP: `response_format`, `structured_outputs`, tool calls."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.e2e.pairs import TextPair
from tests.services.http_client import openai_client
from tests.stack import running_stack
from tests.test_grammar_trial import DEEP

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "The answer: "
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Ends soon, although the model is random: whitespace, which JSON allows, is forbidden.
_UNIT = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
_NO_SPACE = {str(byte): -100 for byte in b" \n\t\r"}
_TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": _UNIT}}]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE, "utf-8")
    return path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(
    text_pair: TextPair, redis: str, template: Path
) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running_stack(
            text_pair.target, text_pair.draft, redis, tokenizer=str(text_pair.target),
            chat_template=str(template), http_port=0,
        ) as stack,
        openai_client(stack) as client,
    ):  # fmt: skip
        yield client


@pytest.mark.parametrize("choice", ["required", "weather"])
async def test_tools_are_called_in_openais_shape(choice: str, client: openai.AsyncOpenAI) -> None:
    """With drafts and without: the same call, streamed or whole."""
    named = {"type": "function", "function": {"name": choice}}
    asked: Any = {
        "model": "", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 200,
        "temperature": 0, "tools": _TOOLS, "parallel_tool_calls": False,
        "tool_choice": choice if choice == "required" else named, "logit_bias": _NO_SPACE,
    }  # fmt: skip
    answers = [
        await client.chat.completions.create(
            **asked, extra_body={"gamma": gamma, "draft_wait": "always"}
        )
        for gamma in (0, 4)
    ]
    found = set()
    for answer in answers:
        (one,) = answer.choices
        assert one.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert one.message.content is None
        (call,) = one.message.tool_calls or ()
        assert call.type == "function"
        assert call.id.startswith("call_")
        found.add((call.function.name, call.function.arguments))
        assert json.loads(call.function.arguments)["unit"] in ("C", "F")
    assert len(found) == 1
    name, arguments, reason = "", "", None
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert {(name, arguments)} == found
    assert reason == answers[0].choices[0].finish_reason


async def test_a_format_that_would_crash_the_program_is_refused(
    client: openai.AsyncOpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError, match="too deep or too large") as caught:
        await client.completions.create(
            model="", prompt=PROMPT, extra_body={"structured_outputs": {"json": DEEP}}
        )
    assert caught.value.param == "structured_outputs.json"
    assert (await client.completions.create(model="", prompt=PROMPT, max_tokens=1)).choices


@pytest.mark.parametrize("field", ["response_format", "structured_outputs", "structural_tag"])
async def test_an_answer_keeps_its_format(field: str, client: openai.AsyncOpenAI) -> None:
    formats: dict[str, Any] = {
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "unit", "schema": _UNIT, "strict": True}
        },
        "structured_outputs": {"json": _UNIT},
        "structural_tag": {
            "type": "structural_tag", "format": {"type": "json_schema", "json_schema": _UNIT}
        },
    }  # fmt: skip
    texts = set()
    for gamma in (0, 4):
        answer = await client.chat.completions.create(
            model="", messages=[{"role": "user", "content": PROMPT}], max_tokens=200, seed=3,
            logit_bias=_NO_SPACE,  # type: ignore[arg-type]
            extra_body={
                "gamma": gamma, "draft_wait": "always", "verification": "coupled",
                field.replace("structural_tag", "response_format"): formats[field],
            },
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        texts.add(answer.choices[0].message.content)
    (text,) = texts
    assert json.loads(text or "")["unit"] in ("C", "F")
