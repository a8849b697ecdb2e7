"""A chat continues after an interrupted answer: its orchestrator died, or its client left."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.runtime.main import LISTENING_PREFIX
from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.redis_fixture import redis_command
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
from tests.services.programs import END_TIMEOUT_S, program
from tests.services.tokenizer_files import CHAT_TEMPLATE, write_tokenizer
from tests.stack import Output, eventually, request

KEY = "outrider:session:{s}"
# As those of Llama-2, Mistral and Gemma.
ALTERNATING = (
    "{%- for message in messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}"
    "{%- endif %}{%- endfor %}"
) + CHAT_TEMPLATE
TEMPLATES = {"alternating": ALTERNATING, "lenient": CHAT_TEMPLATE}


def asked(
    content: str, num_tokens: int, session_id: str = "s", **fields: Any
) -> orchestrator_pb2.GenerateRequest:
    made = orchestrator_pb2.GenerateRequest(session_id=session_id, gamma=0, **fields)
    made.sampling.CopyFrom(request("x", {**GREEDY, "max_tokens": num_tokens}).sampling)
    made.chat.messages.add(role="user", content=content)
    return made


async def generated(system: System, made: orchestrator_pb2.GenerateRequest) -> Output:
    output = Output()
    async for chunk in system.client.Generate(made, timeout=200):
        output.add(chunk)
    return output


async def get(system: System) -> orchestrator_pb2.GetSessionResponse:
    got: orchestrator_pb2.GetSessionResponse = await system.client.GetSession(
        orchestrator_pb2.GetSessionRequest(session_id="s"), timeout=200
    )
    return got


def prompt_of(tokenizer: Tokenizer, *contents: str) -> list[int]:
    """A chat in which user and assistant alternate."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": said} for i, said in enumerate(contents)]
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
async def test_the_answer_of_a_killed_orchestrator_stays_in_the_chat(
    template: str, chat_pair: Pair, redis_url: str, chat_greedy: Greedy, tmp_path: Path
) -> None:
    """Its recorded tokens are the assistant's message; the result has their number."""
    shutil.copytree(chat_pair.target, tmp_path / "target")
    pair = Pair(tmp_path / "target", chat_pair.draft)
    write_tokenizer(pair.target, chat_template=TEMPLATES[template])
    tokenizer = Tokenizer.load(str(pair.target))
    assert tokenizer is not None
    async with both_tiers(pair, draft_kv=None) as tiers:
        words = ["--target-endpoint", tiers.endpoints[0], "--draft-endpoint", ""]
        words += ["--tokenizer", str(pair.target), "--redis-url", redis_url, "--port", "0"]
        async with program("orchestrator", *words, "--redis-wait-s", "60") as process:
            await _cut_off(process, asked("the quick fox", 1_500, create_session=True))
        async with orchestrating(tiers, redis_url, tokenizer=str(pair.target)) as system:
            session = await get(system)
            first = prompt_of(tokenizer, "the quick fox")
            answer = list(session.token_ids)[len(first) :]
            assert answer == chat_greedy(first, len(answer))
            assert session.in_use  # until the lease of the killed one expires
            assert redis_command(redis_url, "HSET", KEY, "lease_until", "0") == b":0"
            second = await generated(system, asked("and then?", 16))
            assert second.result is not None
            assert second.result.interrupted_answer_tokens == len(answer)
            text = _text(tokenizer, answer, first)
            prompt = prompt_of(tokenizer, "the quick fox", text, "and then?")
            assert second.result.usage.prompt_tokens == len(prompt)
            assert second.token_ids == chat_greedy(prompt, 16)
            third = await generated(system, asked("so?", 16))
            prompt = prompt_of(tokenizer, "the quick fox", text, "and then?", second.text, "so?")
            assert third.token_ids == chat_greedy(prompt, 16)
            assert third.result is not None
            assert not third.result.HasField("interrupted_answer_tokens")


async def _cut_off(
    process: asyncio.subprocess.Process, made: orchestrator_pb2.GenerateRequest
) -> None:
    """Kills the orchestrator during the answer."""
    assert process.stdout is not None
    async with asyncio.timeout(END_TIMEOUT_S):
        line = (await process.stdout.readline()).decode()
    address = line.strip().removeprefix(LISTENING_PREFIX)
    async with grpc.aio.insecure_channel(address) as channel:
        call = orchestrator_pb2_grpc.OrchestratorServiceStub(channel).Generate(made, timeout=200)
        output = Output()
        while len(output.token_ids) < 10:
            output.add(await call.read())
        process.kill()

        async def rest() -> None:
            while (chunk := await call.read()) is not grpc.aio.EOF:
                output.add(chunk)

        assert (await refusal(rest())).code is grpc.StatusCode.UNAVAILABLE
        assert len(output.token_ids) < 1_500


@pytest.mark.slow
async def test_the_answer_of_a_client_that_left_stays_in_the_chat(
    chat_pair: Pair, redis_url: str, chat_greedy: Greedy, brake: Brake
) -> None:
    """Continued or resumed first: its tokens are in the chat once."""
    tokenizer = Tokenizer.load(str(chat_pair.target))
    assert tokenizer is not None
    async with (
        both_tiers(chat_pair, draft_kv=None) as tiers,
        orchestrating(tiers, redis_url, tokenizer=str(chat_pair.target)) as system,
    ):
        first = prompt_of(tokenizer, "the quick fox")
        for is_resumed in (False, True):
            output = Output()
            brake.set(10)
            made = asked("the quick fox", 30, create_session=True)
            call = system.client.Generate(made, timeout=200)
            while len(output.token_ids) < 10:
                output.add(await call.read())
            call.cancel()
            await eventually(lambda: _is_free(system))
            brake.release()
            if is_resumed:
                again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=10)
                output.token_ids += (await generated(system, again)).token_ids
            assert output.token_ids == chat_greedy(first, 30 if is_resumed else 10)
            second = await generated(system, asked("and then?", 16))
            prompt = prompt_of(
                tokenizer, "the quick fox", _text(tokenizer, output.token_ids, first), "and then?"
            )
            assert second.token_ids == chat_greedy(prompt, 16)
            assert second.result is not None
            assert second.result.HasField("interrupted_answer_tokens") is not is_resumed
            await system.client.DeleteSession(
                orchestrator_pb2.DeleteSessionRequest(session_id="s"), timeout=200
            )


def _text(tokenizer: Tokenizer, output_ids: list[int], prompt: list[int]) -> str:
    text = tokenizer.detokenizer(prompt)
    return "".join(text.push(token) for token in output_ids) + text.finish()


async def _is_free(system: System) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        return not (await get(system)).in_use
    return False
