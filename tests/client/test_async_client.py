"""AsyncClient against running orchestrators: results, sessions, errors, ends of a generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from outrider.client import AsyncClient, CallFailed, Chunk, InvalidRequest
from tests.client.conftest import Place
from tests.stack import eventually

PROMPT = "the quick"
NUM_TOKENS = 40
# Takes minutes at the slow orchestrator.
ENDLESS = 500


@pytest_asyncio.fixture
async def client(place: Place) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(place.endpoints) as client:
        yield client


@pytest_asyncio.fixture
async def slow(place: Place) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(place.slow) as client:
        yield client


async def nothing_runs(client: AsyncClient) -> bool:
    """Whether no generation is left: each has a session while it runs."""
    return not (await client.list_sessions()).sessions


def joined(chunks: list[Chunk], name: str) -> list[object]:
    return [each for chunk in chunks for each in getattr(chunk, name)]


async def test_chunks_are_the_result(client: AsyncClient) -> None:
    stream = client.generate(
        PROMPT, max_tokens=NUM_TOKENS, seed=1, logprobs=2, ignore_eos=True, gamma=3,
        verification="coupled", draft_wait="always",
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    result = await stream.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    for name in ("token_ids", "origins", "logprobs"):
        assert joined(chunks, name) == getattr(result, name)
        assert len(getattr(result, name)) == NUM_TOKENS
    assert {"accepted", "plain"} < set(result.origins)
    assert len(result.logprobs[0].top_ids) == len(result.logprobs[0].top_logprobs) == 2
    assert result.finish_reason == "length"
    assert result.stop_text is result.stop_token_id is result.eos_token_id is None
    assert result.usage.completion_tokens == NUM_TOKENS
    assert result.speculation.gamma == 3
    assert result.speculation.verification == "coupled"
    assert result.speculation.num_accepted_tokens == result.origins.count("accepted")
    assert result.seed == 1
    assert result.recorded


async def test_a_stop_string_ends_the_output(client: AsyncClient) -> None:
    whole = await client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0).result()
    stop = whole.text[5:8]
    cut = await client.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0, stop=stop).result()
    assert (cut.finish_reason, cut.stop_text) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]


async def test_token_ids_and_no_temporary_session(place: Place) -> None:
    """The same output whether a generation can be resumed or not."""
    outputs = []
    for resume_for_s in (0.0, 30.0):
        async with AsyncClient(place.endpoints[0], resume_for_s=resume_for_s) as client:
            outputs.append(await client.generate([5, 6, 7], max_tokens=9, temperature=0).result())
            await eventually(lambda: nothing_runs(client))
    assert outputs[0].token_ids == outputs[1].token_ids


async def test_a_session_of_two_turns(client: AsyncClient) -> None:
    first = await client.generate(PROMPT, session_id="two", max_tokens=5).result()
    second = await client.generate(" brown", session_id="two", max_tokens=5).result()
    session = await client.get_session("two")
    assert session.num_turns == 2
    assert session.token_ids[-5:] == second.token_ids
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    listed = (await client.list_sessions()).sessions
    assert [(each.session_id, each.num_turns) for each in listed] == [("two", 2)]
    await client.delete_session("two")
    with pytest.raises(CallFailed, match=r"^NOT_FOUND: "):
        await client.get_session("two")
    with pytest.raises(CallFailed, match=r"^NOT_FOUND: "):
        await client.generate("x", session_id="two", create_session=False).result()


async def test_a_session_is_resumed_by_hand(client: AsyncClient) -> None:
    """After the tokens that were received; leaving the loop is like a broken connection."""
    fields = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    whole = await client.generate(PROMPT, **fields).result()  # type: ignore[arg-type]
    received: list[int] = []
    async for chunk in client.generate(PROMPT, session_id="hand", **fields):  # type: ignore[arg-type]
        received += chunk.token_ids
        if len(received) >= 7:
            break
    rest = await client.resume("hand", len(received)).result()
    assert received + rest.token_ids == whole.token_ids
    await client.delete_session("hand")


async def test_a_chat(client: AsyncClient) -> None:
    """Rendered with the template; a wrong message is named."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = await client.chat(messages, max_tokens=3, temperature=0).result()
    rendered = "system: Be brief.\nuser: Hi\n"
    same = await client.generate(rendered, max_tokens=3, temperature=0).result()
    assert answer.token_ids == same.token_ids
    with pytest.raises(InvalidRequest, match=r"^chat\.messages\[1\]\.text: is not a field"):
        client.chat([messages[0], {"role": "user", "text": "Hi"}])


async def test_models_and_audit(client: AsyncClient) -> None:
    models = await client.models()
    assert models.target.vocab_size == 300
    assert models.draft is not None
    assert models.draft_pairing is not None
    assert models.draft_pairing.refused == ""
    assert (await client.audit()).share == 0


async def test_errors_name_field_and_status(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match=r"^max_token: .*; did you mean max_tokens\?"):
        client.generate(PROMPT, max_token=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match=r"^verification: 'couple' is not one of rejection, "):
        client.generate(PROMPT, verification="couple")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"^sampling\.seed: "):
        client.generate(PROMPT, seed=-1)
    with pytest.raises(CallFailed, match=r"^INVALID_ARGUMENT: sampling\.top_p: ") as caught:
        await client.generate(PROMPT, top_p=2.0).result()
    assert (caught.value.code, caught.value.field) == ("INVALID_ARGUMENT", "sampling.top_p")
    assert caught.value.retry_after_s is None


async def test_leaving_the_loop_ends_the_generation(slow: AsyncClient) -> None:
    async for _ in slow.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True, gamma=0):
        break
    await eventually(lambda: nothing_runs(slow))


async def test_closing_the_stream_ends_the_generation(slow: AsyncClient) -> None:
    async with slow.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True, gamma=0) as stream:
        received = await anext(stream)
    assert stream.output.token_ids == received.token_ids
    with pytest.raises(CallFailed, match="left before its end"):
        await stream.result()
    await eventually(lambda: nothing_runs(slow))


async def test_a_cancelled_loop_ends_the_generation(slow: AsyncClient) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for _ in slow.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True, gamma=0):
            started.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), 60)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await eventually(lambda: nothing_runs(slow))


async def test_a_deadline_ends_the_generation(slow: AsyncClient) -> None:
    """The tokens that arrived in time are received."""
    stream = slow.generate(PROMPT, max_tokens=ENDLESS, ignore_eos=True, gamma=0, timeout_s=0.5)
    with pytest.raises(CallFailed, match=r"^DEADLINE_EXCEEDED: "):
        await stream.result()
    assert stream.output.token_ids
    await eventually(lambda: nothing_runs(slow))


async def test_iteration_continues_in_another_task(client: AsyncClient) -> None:
    """As when frameworks read each chunk in a task of its own."""
    stream = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    token_ids: list[int] = []
    while (chunk := await asyncio.create_task(anext_or_none(stream))) is not None:
        token_ids += chunk.token_ids
    assert len(token_ids) == NUM_TOKENS


async def anext_or_none(stream: AsyncIterator[Chunk]) -> Chunk | None:
    return await anext(stream, None)


async def test_a_closed_client_refuses_requests(place: Place) -> None:
    """A stream that runs meanwhile fails, and is not resumed."""
    async with AsyncClient(place.slow) as client:
        stream = client.generate(
            PROMPT, session_id="shut", max_tokens=ENDLESS, ignore_eos=True, gamma=0
        )
        await anext(stream)
    with pytest.raises(CallFailed, match=r"^CANCELLED: "):
        await stream.result()
    with pytest.raises(CallFailed, match=r"^CANCELLED: the client is closed"):
        await client.models()
    async with AsyncClient(place.endpoints) as other:

        async def is_free() -> bool:
            return not (await other.get_session("shut")).in_use

        await eventually(is_free)
        await other.delete_session("shut")
