"""KV pages are reserved as generations grow: concurrency, preemption, and the same outputs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from outrider.model_server import scheduler
from outrider.v1 import sampling_pb2, target_pb2
from tests.services.parts import (
    CONTEXT_LEN,
    GREEDY,
    Brake,
    Greedy,
    Pair,
    System,
    both_tiers,
    clients,
    nothing_held,
    orchestrating,
)
from tests.services.streams import numbers, raw, row, target_open
from tests.stack import Output, eventually, request

TIMEOUT_S = 200
Frame = target_pb2.VerifyRequest
Reason = target_pb2.RowError
COUPLED: dict[str, Any] = {"verification": sampling_pb2.VERIFICATION_COUPLED}


@pytest.fixture(autouse=True)
def _checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle services check their KV accounting all the time; an error ends the service."""
    monkeypatch.setattr(scheduler, "TIDY_INTERVAL_S", 0.02)


async def num_open_is(stack: System, count: int) -> bool:
    return (await stack.target_load()).num_open_generations == count


async def begun(stack: System, prompt: Sequence[int], sampling: Any, **fields: Any) -> Any:
    """A stream that has sent a token, and that token."""
    chunks = aiter(stack.client.Generate(request(prompt, sampling, **fields), timeout=TIMEOUT_S))
    output = Output()
    output.add(await anext(chunks))
    return chunks, output


async def to_its_end(chunks: Any, output: Output) -> list[int]:
    async for chunk in chunks:
        output.add(chunk)
    return output.token_ids


async def test_short_outputs_with_long_limits_run_all_at_once(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """KV for two full contexts, eight requests that might fill one each, outputs of 20 tokens."""
    prompts = [[n, *range(n, n + 30)] for n in range(8)]
    answers = [greedy(prompt, 20) for prompt in prompts]
    async with (
        both_tiers(pair, target_kv=2 * CONTEXT_LEN, draft_kv=2 * CONTEXT_LEN) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        brake.set(10)  # the most tokens that any of them has while all are counted

        async def ask(prompt: list[int], answer: list[int]) -> list[int]:
            sampling = {**GREEDY, "max_tokens": 2_000, "stop_token_ids": [answer[-1]]}
            return await to_its_end(*await begun(stack, prompt, sampling))

        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask(*each)) for each in zip(prompts, answers, strict=True)]
            await eventually(lambda: num_open_is(stack, 8))
            load = await stack.target_load()
            assert load.kv_used_tokens <= 8 * 64, (
                "the tokens that they have, not those that they may get"
            )
            brake.release()
        for task, answer in zip(asking, answers, strict=True):
            assert task.result() == answer[: answer.index(answer[-1]) + 1]
        assert (await stack.target_load()).num_preempted_total == 0
        await eventually(lambda: nothing_held(stack))


async def test_a_shared_prompt_takes_kv_room_once(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """Eight prompts of 500 tokens in 1,024 tokens of KV: all but the last page is shared."""
    prompt = [(7 * n + n * n) % 251 for n in range(496)]
    async with (
        both_tiers(pair, target_kv=1_024, draft_kv=None) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        sampling = {**GREEDY, "max_tokens": 8}
        assert (await stack.generate(prompt, sampling=sampling)).token_ids == greedy(prompt, 8)
        brake.set(2)
        calls = await asyncio.gather(*(begun(stack, [*prompt, n, n], sampling) for n in range(8)))
        assert await num_open_is(stack, 8)
        assert (await stack.target_load()).kv_used_tokens <= 496 + 8 * 16
        brake.release()
        for n, (call, output) in enumerate(calls):
            assert await to_its_end(call, output) == greedy([*prompt, n, n], 8)
        await eventually(lambda: nothing_held(stack))


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "coupled": ({"temperature": 1.0, "seed": 7, "ignore_eos": True}, COUPLED),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_outputs_are_the_same_under_constant_preemption(
    way: str, pair: Pair, redis_url: str
) -> None:
    """KV for two of twelve on both tiers; with drafts, without, and drafted ahead."""
    sampling, fields = WAYS[way]
    rng = random.Random(11)
    asked: list[tuple[list[int], dict[str, Any], dict[str, Any]]] = []
    for n in range(12):
        prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
        given = {**sampling, "max_tokens": rng.randrange(60, 160)}
        how = {"gamma": n % 6, "lookahead": n % 3, "fan_out": 1 + n % 4, "priority": n % 2}
        asked.append((prompt, given, how))
    async with both_tiers(pair, draft_kv=None) as tiers, orchestrating(tiers, redis_url) as stack:
        alone = [
            (await stack.generate(p, sampling=given, gamma=0, **fields)).token_ids
            for p, given, _ in asked
        ]
    async with (
        both_tiers(pair, target_kv=448, draft_kv=448) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        outputs = await asyncio.gather(
            *(stack.generate(p, sampling=given, **how, **fields) for p, given, how in asked)
        )
        assert [output.token_ids for output in outputs] == alone
        assert (await stack.target_load()).num_preempted_total > 0
        await eventually(lambda: nothing_held(stack))


@pytest.mark.slow
async def test_a_generation_that_fits_alone_always_finishes(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Two that fill all of the KV each, to the last token, among others that start and end."""
    long = [list(range(60)), list(range(100, 160))]
    async with (
        both_tiers(pair, target_kv=256, draft_kv=256) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        short = [[n, 5, n] for n in range(6)]
        outputs = await asyncio.gather(
            *(stack.generate(p, sampling={**GREEDY, "max_tokens": 196}, gamma=3) for p in long),
            *(stack.generate(p, sampling={**GREEDY, "max_tokens": 30}, gamma=2) for p in short),
        )
        for prompt, output in zip(long, outputs[:2], strict=True):
            assert output.token_ids == greedy(prompt, 196)
        for prompt, output in zip(short, outputs[2:], strict=True):
            assert output.token_ids == greedy(prompt, 30)
        await eventually(lambda: nothing_held(stack))


async def test_cancelled_generations_free_their_room(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake
) -> None:
    """Running, preempted, and waiting for room."""
    prompts = [[n] * 60 for n in range(8)]
    sampling = {**GREEDY, "max_tokens": 60}
    async with (
        both_tiers(pair, target_kv=256, draft_kv=256) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        brake.set(8)
        calls = [stack.client.Generate(request(prompts[0], sampling), timeout=TIMEOUT_S)]
        first, output = aiter(calls[0]), Output()
        output.add(await anext(first))  # it has room, and so have some of the others
        calls += [
            stack.client.Generate(request(p, sampling), timeout=TIMEOUT_S) for p in prompts[1:]
        ]
        last = aiter(calls[7])

        async def all_have_asked() -> bool:
            return (await stack.target_load()).num_opened_total >= len(prompts)

        await eventually(all_have_asked)
        brake.release()
        for call in calls[1:7]:
            call.cancel()
        assert await to_its_end(first, output) == greedy(prompts[0], 60)
        assert await to_its_end(last, Output()) == greedy(prompts[7], 60)
        await eventually(lambda: nothing_held(stack))


async def test_the_generation_begun_last_is_preempted_and_never_an_earlier_one(
    pair: Pair, greedy: Greedy
) -> None:
    """By age, whichever was opened here first; and it cannot preempt the earlier ones later."""
    async with (
        both_tiers(pair, target_kv=512, draft_kv=None) as tiers,
        clients(tiers) as system,
        raw(system.target.Verify()) as stream,
    ):
        ages = {1: 3_000, 2: 1_000, 3: 2_000}
        contexts = {n: [n] * 150 for n in ages}

        def opening(number: int, age_ms: int, **fields: Any) -> target_pb2.TargetOpen:
            return target_open(number, prompt_len=150, max_len=500, age_ms=age_ms, **fields)

        for number, age_ms in ages.items():
            rows = [row(number, 0, contexts[number])]
            await stream.write(Frame(opens=[opening(number, age_ms)], rows=rows))
            assert isinstance(await stream.answer(number), target_pb2.VerifyResult)
        # The earliest one grows until both others are preempted.
        for keep_len in (150, 300):
            await stream.write(Frame(rows=[row(1, keep_len, [1] * 150)]))
            answer = await stream.answer(1)
            assert isinstance(answer, target_pb2.VerifyResult), answer
        for number in (2, 3):
            lost = await stream.answer(number)
            assert lost.reason == Reason.REASON_KV_FULL
            assert "began earlier" in lost.detail
        # No later one takes its room, not even if it may preempt.
        again = opening(4, 2_000, preempts=True)
        await stream.write(Frame(opens=[again], rows=[row(4, 0, contexts[3])]))
        assert (await stream.answer(4)).reason == Reason.REASON_KV_FULL
        # One that began before it does, and has the output that it would have alone.
        before = opening(5, 60_000, preempts=True)
        await stream.write(Frame(opens=[before], rows=[row(5, 0, contexts[2])]))
        answer = await stream.answer(5)
        assert isinstance(answer, target_pb2.VerifyResult), answer
        assert numbers(answer.sample_ids) == greedy(contexts[2], 1)
        assert (await stream.answer(1)).reason == Reason.REASON_KV_FULL
        assert (await system.target_load()).num_preempted_total == 3


async def test_idle_sessions_are_evicted_before_running_generations(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Their KV does not count as used, and is found again by its tokens or recomputed."""
    async with (
        both_tiers(pair, target_kv=512, draft_kv=512) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        fields: dict[str, Any] = {"create_session": True, "sampling": {**GREEDY, "max_tokens": 8}}
        for n in range(3):
            await stack.generate([n] * 100, session_id=f"s{n}", **fields)

        async def three_are_kept() -> bool:
            load = await stack.target_load()
            return (load.num_idle_sessions, load.kv_used_tokens) == (3, 0)

        await eventually(three_are_kept)
        prompt = [9] * 100
        output = await stack.generate(prompt, sampling={**GREEDY, "max_tokens": 400})
        assert output.token_ids == greedy(prompt, 400)
        load = await stack.target_load()
        assert (load.num_idle_sessions, load.num_preempted_total) == (0, 0)
        second = await stack.generate([7], session_id="s0", sampling={**GREEDY, "max_tokens": 8})
        assert second.token_ids == greedy([*[0] * 100, *greedy([0] * 100, 8), 7], 8)
