"""Chats with parts, tools, template variables and continued answers, through gRPC and sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.client.request import build_request
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2
from tests.chat_templates import CLOCK, TEMPLATES, call
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    System,
    both_tiers,
    orchestrating,
    refusal,
)
from tests.stack import Output, eventually

NUM_TOKENS = 12
USER = {"role": "user", "content": "the quick fox"}
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "what time"}]},
    {"role": "assistant", "content": "", "tool_calls": [call("now", '{"zone": "CET"}')]},
    {"role": "tool", "tool_call_id": "abcdef123", "content": "noon"},
]


@pytest.fixture
async def system(chat_pair: Pair, redis_url: str, tmp_path: Path) -> AsyncIterator[System]:
    """With a template of the operator's own."""
    (tmp_path / "own.jinja").write_text(TEMPLATES["qwen3"], "utf-8")
    async with (
        both_tiers(chat_pair, draft_kv=None) as tiers,
        orchestrating(
            tiers,
            redis_url,
            tokenizer=str(chat_pair.target),
            chat_template=str(tmp_path / "own.jinja"),
        ) as system,
    ):
        yield system


@pytest.fixture
def tokenizer(chat_pair: Pair, tmp_path: Path) -> Tokenizer:
    (tmp_path / "copy.jinja").write_text(TEMPLATES["qwen3"], "utf-8")
    loaded = Tokenizer.load(str(chat_pair.target), str(tmp_path / "copy.jinja"))
    assert loaded is not None
    return loaded


def prompt_of(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(messages, **options), add_special_tokens=False)


async def chatted(system: System, messages: list[dict[str, Any]], **fields: Any) -> Output:
    made = {**GREEDY, "max_tokens": NUM_TOKENS, "gamma": 3, **fields}
    return await generated(system, build_request(messages=messages, fields=made))


async def continued(system: System, text: str, **fields: Any) -> Output:
    made = {**GREEDY, "max_tokens": NUM_TOKENS, "gamma": 3, **fields}
    return await generated(system, build_request(text, fields=made))


async def generated(system: System, request: orchestrator_pb2.GenerateRequest) -> Output:
    output = Output()
    async for chunk in system.client.Generate(request, timeout=200):
        output.add(chunk)
    return output


async def test_the_template_gets_every_field(
    system: System, tokenizer: Tokenizer, chat_greedy: Greedy
) -> None:
    """Each request as rendered here; drafted, and greedy as the target alone."""
    kwargs = {"enable_thinking": False}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"tools": [CLOCK]}, {"tools": [CLOCK]}),
        ({"chat_template_kwargs": kwargs}, {"kwargs": kwargs}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
    ]
    for fields, options in cases:
        for messages in (TOOL_TURNS, [USER]):
            output = await chatted(system, messages, **fields)
            prompt = prompt_of(tokenizer, messages, **options)
            assert output.token_ids == chat_greedy(prompt, NUM_TOKENS)
            assert output.result is not None
            assert output.result.usage.prompt_tokens == len(prompt)
    text = await continued(system, "the quick fox", session_id="text")
    prompt = tokenizer.encode("the quick fox")
    assert text.token_ids == chat_greedy(prompt, NUM_TOKENS)
    more = await continued(system, "and", session_id="text", truncate_prompt_tokens=5)
    prompt = [*prompt, *text.token_ids, *tokenizer.encode("and", add_special_tokens=False)][-5:]
    assert more.token_ids == chat_greedy(prompt, NUM_TOKENS)
    got = orchestrator_pb2.GetSessionRequest(session_id="text")
    kept = (await system.client.GetSession(got, timeout=200)).token_ids
    assert list(kept) == [*prompt, *more.token_ids]
    truncated = await chatted(system, [USER], truncate_prompt_tokens=7)
    assert truncated.token_ids == chat_greedy(prompt_of(tokenizer, [USER])[-7:], NUM_TOKENS)


async def test_refused_fields_are_named(system: System) -> None:
    for field, messages, fields in (
        ("chat.messages.tool_calls", [USER, {**USER, "tool_calls": [call("f", "[]")]}], {}),
        ("chat.tools", [USER], {"tools": [{"type": "function"}]}),
        ("chat.chat_template_kwargs", [USER], {"chat_template_kwargs": {"tools": 1}}),
        (
            "chat.continue_final_message",
            [{**USER, "content": ""}],
            {"continue_final_message": True},
        ),
        ("truncate_prompt_tokens", [USER], {"truncate_prompt_tokens": 0}),
    ):
        refused = await refusal(chatted(system, messages, **fields))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.message.startswith(field)


async def test_a_session_keeps_messages_and_continued_answers(
    system: System, tokenizer: Tokenizer, chat_greedy: Greedy
) -> None:
    """The continued message and the output are one message of the next turn.

    Stop strings that the client has asked for are not in it.
    """
    start = {"role": "assistant", "content": "it is"}
    answer = await chatted(
        system,
        [*TOOL_TURNS, start],
        session_id="s",
        tools=[CLOCK],
        continue_final_message=True,
    )
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = prompt_of(tokenizer, [*TOOL_TURNS, start], tools=[CLOCK], **options)
    assert answer.token_ids == chat_greedy(prompt, NUM_TOKENS)
    turns = [*TOOL_TURNS, {"role": "assistant", "content": "it is" + answer.text}, USER]
    second = await chatted(system, [USER], session_id="s", tools=[CLOCK])
    whole = prompt_of(tokenizer, turns, tools=[CLOCK])
    assert second.token_ids == chat_greedy(whole, NUM_TOKENS)
    stop = second.text[3]
    at = {"stop": stop, "include_stop_str_in_output": True}
    turns += [{"role": "assistant", "content": second.text}, USER]
    third = await chatted(system, [USER], session_id="s", **at)
    if third.result is not None and third.result.WhichOneof("stop") == "stop_text":
        assert third.text.endswith(stop)
        turns += [{"role": "assistant", "content": third.text.removesuffix(stop)}, USER]
    else:
        turns += [{"role": "assistant", "content": third.text}, USER]
    fourth = await chatted(system, [USER], session_id="s")
    assert fourth.token_ids == chat_greedy(prompt_of(tokenizer, turns), NUM_TOKENS)


async def test_an_interrupted_continued_answer_goes_on_or_is_resumed(
    system: System, tokenizer: Tokenizer, chat_greedy: Greedy, brake: Brake
) -> None:
    """What its client left is one message; also where the chat has no other."""
    start = {"role": "assistant", "content": "fox "}
    options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = prompt_of(tokenizer, [start], **options)
    for name, is_resumed in (("left", False), ("resumed", True)):
        output = Output()
        brake.set(6)
        fields = {**GREEDY, "max_tokens": NUM_TOKENS, "gamma": 0, "session_id": name}
        request = build_request(messages=[start], fields={**fields, "continue_final_message": True})
        stream = system.client.Generate(request, timeout=200)
        while len(output.token_ids) < 6:
            output.add(await stream.read())
        stream.cancel()

        async def is_free(name: str = name) -> bool:
            got = orchestrator_pb2.GetSessionRequest(session_id=name)
            return not (await system.client.GetSession(got, timeout=200)).in_use

        await eventually(is_free)
        brake.release()
        num = 6
        if is_resumed:
            again = orchestrator_pb2.GenerateRequest(session_id=name, resume_from=6)
            async for chunk in system.client.Generate(again, timeout=200):
                output.add(chunk)
            num = NUM_TOKENS
        assert output.token_ids == chat_greedy(prompt, num)
        second = await chatted(system, [USER], session_id=name)
        text = tokenizer.decode([*prompt, *output.token_ids])[len(tokenizer.decode(prompt)) :]
        turns = [{"role": "assistant", "content": "fox " + text}, USER]
        assert second.token_ids == chat_greedy(prompt_of(tokenizer, turns), NUM_TOKENS)


async def test_a_resumed_turn_keeps_its_fields(
    chat_pair: Pair, redis_url: str, chat_greedy: Greedy, brake: Brake
) -> None:
    """At another orchestrator: bad words, kept special tokens and included stops."""
    words = {"bad_words_token_ids": [[7]], "skip_special_tokens": False}
    sampling = {**GREEDY, **words, "max_tokens": 30, "include_stop_str_in_output": True}
    async with both_tiers(chat_pair, draft_kv=None) as tiers:
        tokenizer = str(chat_pair.target)
        async with orchestrating(tiers, redis_url, tokenizer=tokenizer) as first:
            whole = Output()
            free = build_request("the fox", fields={**GREEDY, "max_tokens": 30, "gamma": 0})
            async for chunk in first.client.Generate(free, timeout=200):
                whole.add(chunk)
            # Ban a token that the output has, and end at its text after it.
            sampling["bad_words_token_ids"] = [[whole.token_ids[3]]]
            made = build_request("the fox", fields={**sampling, "gamma": 3})
            expected = Output()
            async for chunk in first.client.Generate(made, timeout=200):
                expected.add(chunk)
            assert expected.token_ids[:3] == whole.token_ids[:3]
            assert whole.token_ids[3] not in expected.token_ids
            brake.set(8)
            named = build_request("the fox", fields={**sampling, "gamma": 0, "session_id": "s"})
            output, stream = Output(), first.client.Generate(named, timeout=200)
            while len(output.token_ids) < 8:
                output.add(await stream.read())
            stream.cancel()
            brake.release()
        async with orchestrating(tiers, redis_url, tokenizer=tokenizer) as second:
            again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=8)
            async for chunk in second.client.Generate(again, timeout=200):
                output.add(chunk)
    assert output.token_ids == expected.token_ids
    assert output.text == expected.text
