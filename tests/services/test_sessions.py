"""Sessions over several calls: turns, re-used KV, records, refusals, deletion, expiry."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from outrider.tokenizer import Tokenizer
from outrider.v1 import orchestrator_pb2, target_pb2
from tests.redis_fixture import redis_command
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    both_tiers,
    nothing_held,
    orchestrating,
    refusal,
    whole,
)
from tests.services.streams import raw, row, target_open
from tests.stack import Output, Stack, eventually, request

FIRST = list(range(10, 50))
SECOND = [7, 9, 11, 13, 17]
GAMMA = 4
# Of session s.
KEYS = ("outrider:session:{s}", "outrider:session:{s}:tokens")


async def turn(stack: Stack, prompt: Any, num_tokens: int = 24, **fields: Any) -> Output:
    fields.setdefault("session_id", "s")
    return await stack.generate(
        prompt, sampling={**GREEDY, "max_tokens": num_tokens}, gamma=GAMMA, **fields
    )


async def get(stack: Stack, session_id: str = "s") -> orchestrator_pb2.GetSessionResponse:
    return await stack.client.GetSession(
        orchestrator_pb2.GetSessionRequest(session_id=session_id), timeout=200
    )


async def delete(stack: Stack, session_id: str = "s") -> None:
    await stack.client.DeleteSession(
        orchestrator_pb2.DeleteSessionRequest(session_id=session_id), timeout=200
    )


async def chat(stack: Stack, content: str, **fields: Any) -> Output:
    asked = orchestrator_pb2.GenerateRequest(session_id="s", **fields)
    asked.sampling.CopyFrom(request("x", {**GREEDY, "max_tokens": 16}).sampling)
    asked.chat.messages.add(role="user", content=content)
    output = Output()
    async for chunk in stack.client.Generate(asked, timeout=200):
        output.add(chunk)
    return output


async def test_turns_continue_one_conversation(pair: Pair, redis_url: str, greedy: Greedy) -> None:
    """Three turns equal greedy runs over the whole conversation; no token is computed twice."""
    async with whole(pair, redis_url) as stack:
        context: list[int] = []
        for number, prompt in enumerate((FIRST, SECOND, SECOND[::-1])):
            target_before, draft_before = await stack.target_load(), await stack.draft_load()
            output = await turn(stack, prompt, create_session=number == 0)
            num_held = len(context)
            context += prompt
            assert output.token_ids == greedy(context, 24)
            assert output.result is not None
            usage = output.result.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(context), 24)
            # The last token of a turn was not run. It is the first one of the next turn.
            assert usage.cached_tokens == max(0, num_held - 1)
            context += output.token_ids
            target, draft = await stack.target_load(), await stack.draft_load()
            num_new = len(prompt) + bool(num_held)
            done = target.num_prefill_tokens_total - target_before.num_prefill_tokens_total
            assert done <= num_new, "the target prefills only what is new"
            done = draft.num_prefill_tokens_total - draft_before.num_prefill_tokens_total
            assert done <= num_new + GAMMA + 1, "the draft also, but for its last block"


async def test_get_session_returns_the_record(pair: Pair, redis_url: str) -> None:
    async with both_tiers(pair) as tiers, orchestrating(tiers, redis_url) as stack:
        first = await turn(stack, FIRST, create_session=True)
        second = await turn(stack, SECOND)
        session = await get(stack)
        both = (first.speculation, second.speculation)
        assert list(session.token_ids) == FIRST + first.token_ids + SECOND + second.token_ids
        assert session.num_turns == 2
        assert not session.in_use
        assert session.num_emitted_tokens == 48
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
            assert getattr(session, name) == sum(getattr(s, name) for s in both), name
        assert session.num_accepted_tokens > 0
        target, draft = tiers.endpoints
        assert session.target_kv.replica == target
        assert session.target_kv.cached_len == len(session.token_ids) - 1
        assert session.target_kv.epoch == session.draft_kv.epoch == session.epoch
        assert session.draft_kv.replica == draft
        assert len(FIRST) < session.draft_kv.cached_len < len(session.token_ids)
        assert 0 < session.expires_in_s <= 3600


async def test_delete_session_frees_both_tiers(pair: Pair, redis_url: str) -> None:
    async with whole(pair, redis_url) as stack:
        await turn(stack, FIRST, create_session=True)
        await eventually(lambda: _one_is_kept(stack))
        await delete(stack)
        await eventually(lambda: nothing_held(stack))
        assert redis_command(redis_url, "DBSIZE") == b":0"
        for call in (get(stack), delete(stack), turn(stack, SECOND)):
            assert (await refusal(call)).code is grpc.StatusCode.NOT_FOUND
        again = await turn(stack, FIRST, create_session=True)
        assert again.result is not None
        # Full pages, by the prefix cache.
        assert again.result.usage.cached_tokens == len(FIRST) // 16 * 16


async def _one_is_kept(stack: Stack) -> bool:
    """Idle at both tiers, and evictable."""
    loads: list[Any] = [await stack.target_load(), await stack.draft_load()]
    return all(
        (load.num_open_generations, load.num_idle_sessions, load.kv_used_tokens) == (0, 1, 0)
        for load in loads
    )


async def test_unknown_sessions_are_not_found(pair: Pair, redis_url: str) -> None:
    async with whole(pair, redis_url) as stack:
        for call in (turn(stack, FIRST), get(stack), delete(stack)):
            refused = await refusal(call)
            assert refused.code is grpc.StatusCode.NOT_FOUND
            assert "session s" in refused.message
        assert redis_command(redis_url, "DBSIZE") == b":0"


async def test_a_session_in_use_is_refused_and_not_disturbed(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    async with whole(pair, redis_url) as stack:
        asked = request(
            FIRST, {**GREEDY, "max_tokens": 300}, session_id="s", create_session=True, gamma=2
        )
        brake.set(1)  # in use until the brake is released
        running = aiter(stack.client.Generate(asked, timeout=200))
        output = Output()
        output.add(await anext(running))
        assert (await get(stack)).in_use
        for call in (turn(stack, SECOND), delete(stack), turn(stack, SECOND, create_session=True)):
            refused = await refusal(call)
            assert refused.code is grpc.StatusCode.ABORTED
            assert "in use by another request" in refused.message
        brake.release()
        async for chunk in running:
            output.add(chunk)
        assert output.token_ids == greedy(FIRST, 300)
        session = await get(stack)
        assert not session.in_use
        assert session.num_turns == 1


async def test_chat_over_two_turns(chat_pair: Pair, redis_url: str, chat_greedy: Greedy) -> None:
    """The template is rendered over all messages, including the answers."""
    tokenizer = Tokenizer.load(str(chat_pair.target))
    assert tokenizer is not None
    async with whole(chat_pair, redis_url, tokenizer=str(chat_pair.target)) as stack:
        first = await chat(stack, "the quick fox", create_session=True)
        messages = [{"role": "user", "content": "the quick fox"}]
        prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        assert first.token_ids == chat_greedy(prompt, 16)
        second = await chat(stack, "and then?")
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "and then?"},
        ]
        whole_prompt = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
        assert second.token_ids == chat_greedy(whole_prompt, 16)
        assert second.result is not None
        assert second.result.usage.prompt_tokens == len(whole_prompt)
        assert second.result.usage.cached_tokens >= len(prompt), "the first prompt is the same"
        assert list((await get(stack)).token_ids) == whole_prompt + second.token_ids


async def test_chat_and_text_do_not_mix(chat_pair: Pair, redis_url: str) -> None:
    async with whole(chat_pair, redis_url, tokenizer=str(chat_pair.target)) as stack:
        await chat(stack, "the quick fox", create_session=True)
        for prompt in ("fox", SECOND):
            refused = await refusal(turn(stack, prompt))
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.fields == ["session_id"]
            assert "chat" in refused.message
        await turn(stack, "the quick", session_id="t", create_session=True)
        await delete(stack)
        await turn(stack, "the quick", create_session=True)
        refused = await refusal(chat(stack, "fox"))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["session_id"]
        assert (await get(stack)).num_turns == 1
        await turn(stack, " fox")  # text can be continued


@pytest.mark.slow
async def test_sessions_expire(pair: Pair, redis_url: str) -> None:
    """session_ttl_s after the last turn. The test shortens the expiry in Redis."""

    def expire_in(seconds: int) -> None:
        for key in KEYS:
            assert redis_command(redis_url, "PEXPIRE", key, str(1000 * seconds)) == b":1"

    async def is_gone() -> bool:
        return redis_command(redis_url, "DBSIZE") == b":0"

    async with whole(pair, redis_url, session_ttl_s=1_000) as stack:
        await turn(stack, FIRST, create_session=True)
        assert 500 < (await get(stack)).expires_in_s <= 1_000
        expire_in(500)
        assert 0 < (await get(stack)).expires_in_s <= 500
        await turn(stack, SECOND)
        assert 500 < (await get(stack)).expires_in_s <= 1_000
        for key in KEYS:
            left_ms = int(redis_command(redis_url, "PTTL", key).removeprefix(b":"))
            assert 500_000 < left_ms <= 1_000_000
        expire_in(1)
        await eventually(is_gone)
        assert (await refusal(get(stack))).code is grpc.StatusCode.NOT_FOUND
        assert (await refusal(turn(stack, SECOND))).code is grpc.StatusCode.NOT_FOUND


async def test_one_off_calls_leave_no_session(pair: Pair, redis_url: str) -> None:
    async with whole(pair, redis_url) as stack:
        outputs = await asyncio.gather(
            *(turn(stack, FIRST, session_id="", num_tokens=8 + i) for i in range(8))
        )
        assert len({output.session_id for output in outputs}) == 8
        await eventually(lambda: nothing_held(stack))
        assert redis_command(redis_url, "DBSIZE") == b":0"
        refused = await refusal(get(stack, outputs[0].session_id))
        assert refused.code is grpc.StatusCode.NOT_FOUND


async def test_a_session_of_another_model_is_refused(
    pair: Pair, chat_pair: Pair, redis_url: str
) -> None:
    async with whole(pair, redis_url) as stack:
        await turn(stack, FIRST, create_session=True)
    async with whole(chat_pair, redis_url) as stack:
        refused = await refusal(turn(stack, SECOND))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.fields == ["session_id"]
        assert "model" in refused.message
        assert not (await get(stack)).in_use, "the refused call took no lease"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["evicted", "forgotten", "another replica"])
async def test_lost_kv_is_computed_again(
    way: str, pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """KV that is gone between two turns costs a prefill and changes no token."""
    async with both_tiers(pair, target_kv=640, draft_kv=640) as tiers:
        async with orchestrating(tiers, redis_url) as stack:
            first = await turn(stack, FIRST, create_session=True)
            if way == "evicted":
                for number in range(12):
                    other = [100 + number, *FIRST]
                    await turn(stack, other, session_id=f"other-{number}", create_session=True)
            elif way == "forgotten":
                await eventually(lambda: _idle_sessions_are(stack, 1))
                stream = stack.target.Verify()
                await stream.write(target_pb2.VerifyRequest(forget_session_ids=["s"]))
                await eventually(lambda: _idle_sessions_are(stack, 0))
                stream.cancel()
        async with both_tiers(pair) as others:
            tiers = others if way == "another replica" else tiers
            async with orchestrating(tiers, redis_url) as stack:
                second = await turn(stack, SECOND)
                context = FIRST + first.token_ids + SECOND
                assert second.token_ids == greedy(context, 24)
                assert second.result is not None
                # If it was only forgotten, the prefix cache has its full pages.
                num_held = (len(FIRST) + 24 - 1) // 16 * 16
                found = second.result.usage.cached_tokens
                assert found == (num_held if way == "forgotten" else 0)
                third = await turn(stack, SECOND)
                context += second.token_ids
                assert third.token_ids == greedy(context + SECOND, 24)
                assert third.result is not None
                assert third.result.usage.cached_tokens == len(context) - 1


async def _idle_sessions_are(stack: Stack, count: int) -> bool:
    return (await stack.target_load()).num_idle_sessions == count


async def test_a_turn_without_room_leaves_the_session_unchanged(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """A retry after RESOURCE_EXHAUSTED must not find its own prompt in the session."""
    async with (
        both_tiers(pair, target_kv=256, draft_kv=None) as tiers,
        orchestrating(tiers, redis_url, max_waiting=0) as stack,
    ):
        first = await turn(stack, FIRST, create_session=True)
        held = FIRST + first.token_ids
        await eventually(lambda: _num_open_is(stack, 0))  # makes room for the blocker
        async with raw(stack.target.Verify()) as blocker:
            opening = target_open(1, prompt_len=230, max_len=244)
            row_of_it = row(1, 0, list(range(230)))
            await blocker.write(target_pb2.VerifyRequest(opens=[opening], rows=[row_of_it]))
            assert isinstance(await blocker.answer(1), target_pb2.VerifyResult)
            refused = await refusal(turn(stack, SECOND))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.retry_after_s is not None
        session = await get(stack)
        assert list(session.token_ids) == held
        assert session.num_turns == 1
        await eventually(lambda: _num_open_is(stack, 0))
        assert (await turn(stack, SECOND)).token_ids == greedy(held + SECOND, 24)


async def _num_open_is(stack: Stack, count: int) -> bool:
    return (await stack.target_load()).num_open_generations == count
