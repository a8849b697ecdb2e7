"""Several orchestrators: in turn, away from a dead one, and on from where a killed one stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from outrider.cli.relay import Relay
from outrider.cli.supervisor import Program
from outrider.client import AsyncClient, Client, Generation, ResumeFailed
from tests.client.conftest import Place

PROMPT = "the quick"
NUM_TOKENS = 60
UNUSED = "127.0.0.1:1"


async def started(place: Place, log_dir: Path) -> tuple[str, Program]:
    """A slow orchestrator in a process of its own."""
    arguments = [
        "orchestrator", f"--target-endpoint={place.slow_target}", "--port=0",
        f"--redis-url={place.redis_url}", f"--tokenizer={place.model}",
    ]  # fmt: skip
    program = await Program.start("orchestrator", arguments, log_dir)
    return await program.listening(), program


@pytest.mark.slow
async def test_one_of_two_is_killed_in_mid_stream(place: Place, tmp_path: Path) -> None:
    """Both clients have all tokens once, and avoid the dead orchestrator afterwards."""
    fields = {"max_tokens": NUM_TOKENS, "seed": 7, "ignore_eos": True, "logprobs": None}
    fields |= {"verification": "coupled", "gamma": 0}
    endpoint, program = await started(place, tmp_path)
    endpoints, messages = (endpoint, place.endpoints[0]), list[str]()
    with Client(endpoints, report=messages.append) as blocking:
        async with AsyncClient(endpoints, report=messages.append) as client:
            whole = await AsyncClient(place.endpoints[1]).generate(PROMPT, **fields).result()  # type: ignore[arg-type]
            sync_stream = blocking.generate(PROMPT, **fields)  # type: ignore[arg-type]
            await asyncio.to_thread(next, sync_stream)
            stream = client.generate(PROMPT, session_id="mine", **fields)  # type: ignore[arg-type]
            texts, token_ids = [], list[int]()
            async for chunk in stream:
                if not token_ids:
                    program.kill()  # SIGKILL
                texts.append(chunk.text)
                token_ids += chunk.token_ids
            outputs = [await stream.result(), await asyncio.to_thread(sync_stream.result)]
            assert ("".join(texts), token_ids) == (whole.text, whole.token_ids)
            for output in outputs:
                assert_equal(output, whole)
            resumed = [message for message in messages if message.startswith("resumed at ")]
            assert resumed == [f"resumed at {place.endpoints[0]}"] * 2
            assert sum("the stream broke after " in message for message in messages) == 2
            messages.clear()
            for _ in range(4):
                await client.generate(PROMPT, max_tokens=2).result()
            await client.models()
            assert messages == []
            await client.delete_session("mine")


def assert_equal(one: Generation, other: Generation) -> None:
    assert one.token_ids == other.token_ids
    assert one.text == other.text
    assert len(one.origins) == len(one.token_ids)
    assert one.usage.completion_tokens == NUM_TOKENS


async def test_endpoints_are_used_in_turn(place: Place) -> None:
    """And the one that fails is reported once, then avoided."""
    messages: list[str] = []
    async with AsyncClient([UNUSED, *place.endpoints], report=messages.append) as client:
        for _ in range(6):
            await client.generate(PROMPT, max_tokens=2).result()
            await client.list_sessions()
    (message,) = messages
    assert f"nothing answers at {UNUSED}" in message
    assert message.endswith("; trying the next endpoint")


async def test_no_orchestrator_resumes(place: Place) -> None:
    """The error has what resuming by hand needs; the temporary session is kept for it."""
    fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "gamma": 0}
    host, port = place.slow.split(":")
    async with (
        AsyncClient(place.endpoints) as other,
        Relay("127.0.0.1", 0, host, int(port), 0.0) as relay,
        AsyncClient(relay.address, resume_for_s=0.5) as client,
    ):
        whole = await other.generate(PROMPT, **fields).result()  # type: ignore[arg-type]
        stream = client.generate(PROMPT, **fields)  # type: ignore[arg-type]
        await anext(stream)
        relay.refuses = True
        relay.reset()
        with pytest.raises(ResumeFailed, match=r"^UNAVAILABLE: ") as caught:
            await stream.result()
        assert caught.value.can_resume
        num_received = caught.value.num_received
        assert num_received == len(stream.output.token_ids)
        rest = await other.resume(caught.value.session_id, num_received).result()
        assert stream.output.token_ids + rest.token_ids == whole.token_ids
        await other.delete_session(caught.value.session_id)
