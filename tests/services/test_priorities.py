"""More requests than fit: queueing, rejection and preemption by priority."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

import orchestrator.app
from orchestrator.admission.queue import AdmissionQueue
from outrider.security.keys import KeyLimits
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.security.parts import write_keys
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
from tests.stack import Output, Stack, eventually, request

PROMPT = list(range(20, 60))
LONG = {**GREEDY, "max_tokens": 1_500}
SHORT = {**GREEDY, "max_tokens": 4}
TIMEOUT_S = 200


@pytest.fixture
def admissions(monkeypatch: pytest.MonkeyPatch) -> list[AdmissionQueue]:
    """The admission queue of each orchestrator that is started."""
    made: list[AdmissionQueue] = []

    def make(max_running: int, max_waiting: int) -> AdmissionQueue:
        made.append(AdmissionQueue(max_running, max_waiting))
        return made[-1]

    monkeypatch.setattr(orchestrator.app, "AdmissionQueue", make)
    return made


async def begun(
    stack: Stack, sampling: dict[str, Any], prompt: Sequence[int] = (3,), **fields: Any
) -> Any:
    """A stream that has sent a token."""
    call = stack.client.Generate(request(prompt, sampling, **fields), timeout=TIMEOUT_S)
    await call.read()
    return call


async def so_many_wait(admissions: list[AdmissionQueue], count: int) -> None:
    (admission,) = admissions

    async def do_they() -> bool:
        return admission.num_waiting == count

    await eventually(do_they)


async def so_many_run(stack: Stack, count: int) -> None:
    """At the target."""

    async def do_they() -> bool:
        return (await stack.target_load()).num_open_generations == count

    await eventually(do_they)


async def test_queued_requests_run_in_the_order_of_priority(
    pair: Pair, redis_url: str, brake: Brake, admissions: list[AdmissionQueue]
) -> None:
    async with whole(pair, redis_url, max_generations=1, max_waiting=4) as stack:
        brake.set(1)
        first = await begun(stack, LONG)
        served: list[int] = []

        async def ask(priority: int) -> None:
            await stack.generate(PROMPT, sampling=SHORT, priority=priority)
            served.append(priority)

        async with asyncio.TaskGroup() as tasks:
            for priority in (2, 1, -3, 0):
                tasks.create_task(ask(priority))
            await so_many_wait(admissions, 4)
            # The fifth is rejected, unless it is more urgent than the last.
            refused = await refusal(stack.generate(PROMPT, sampling=SHORT, priority=2))
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.retry_after_s is not None
            assert served == []
            first.cancel()
            brake.release()
        assert served == [-3, 0, 1, 2]
        await eventually(lambda: nothing_held(stack))


async def test_a_deadline_ends_queued_and_running_requests(
    pair: Pair, redis_url: str, brake: Brake
) -> None:
    """DEADLINE_EXCEEDED; its place and its KV are free for others."""
    async with whole(pair, redis_url, max_generations=1) as stack:
        brake.set(1)
        first = await begun(stack, LONG)
        late = stack.client.Generate(request(PROMPT, SHORT), timeout=0.5)
        refused = await refusal(anext(aiter(late)))
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        first.cancel()
        running = stack.client.Generate(request(PROMPT, LONG, gamma=0), timeout=0.5)

        async def to_its_end() -> None:
            async for _ in running:
                pass

        assert (await refusal(to_its_end())).code is grpc.StatusCode.DEADLINE_EXCEEDED
        brake.release()
        await eventually(lambda: nothing_held(stack))
        assert (await stack.generate(PROMPT, sampling=SHORT)).token_ids


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "coupled": (
        {"temperature": 1.0, "seed": 7, "ignore_eos": True},
        {"verification": sampling_pb2.VERIFICATION_COUPLED},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_less_urgent_requests_are_preempted_with_the_same_output(
    way: str, pair: Pair, redis_url: str, brake: Brake
) -> None:
    """Their KV is dropped and recomputed; their outputs are the same."""
    sampling, fields = WAYS[way]
    sampling = {**sampling, "max_tokens": 60}
    prompts = [[n] * 420 for n in (3, 4)]
    async with (
        both_tiers(pair, target_kv=1_024) as tiers,
        orchestrating(tiers, redis_url) as stack,
    ):
        alone = [
            await stack.generate(prompt, sampling=sampling, gamma=0, **fields) for prompt in prompts
        ]
        brake.set(1)  # both still run when the urgent one arrives
        asked = [request(p, sampling, priority=5, gamma=2, **fields) for p in prompts]
        calls = [stack.client.Generate(each, timeout=TIMEOUT_S) for each in asked]
        streams, outputs = [aiter(call) for call in calls], [Output(), Output()]
        for stream, output in zip(streams, outputs, strict=True):
            output.add(await anext(stream))
        asking = asyncio.create_task(
            stack.generate([5] * 300, sampling={**GREEDY, "max_tokens": 100}, priority=1)
        )
        await eventually(lambda: _one_has_made_room(stack))
        brake.release()
        urgent = await asking
        assert len(urgent.token_ids) == 100
        for stream, output, expected in zip(streams, outputs, alone, strict=True):
            async for chunk in stream:
                output.add(chunk)
            assert output.token_ids == expected.token_ids
        await eventually(lambda: nothing_held(stack))


async def _one_has_made_room(stack: Stack) -> bool:
    return (await stack.target_load()).num_preempted_total >= 1


@pytest.mark.slow
async def test_equal_priorities_do_not_preempt_each_other(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake, admissions: list[AdmissionQueue]
) -> None:
    """A request waits until the others are done; too many are rejected."""
    async with (
        both_tiers(pair, target_kv=1_024) as tiers,
        orchestrating(tiers, redis_url, max_waiting=1) as stack,
    ):
        brake.set(1)
        sampling = {**GREEDY, "max_tokens": 40}
        calls = [await begun(stack, sampling, [n] * 450) for n in (3, 4)]
        waits = asyncio.create_task(stack.generate([5] * 300, sampling=sampling, gamma=2))
        await so_many_wait(admissions, 1)
        refused = await refusal(stack.generate([6] * 300, sampling=sampling))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not waits.done()
        for call in calls:
            call.cancel()
        brake.release()
        assert (await waits).token_ids == greedy([5] * 300, 40)
        assert (await stack.target_load()).num_preempted_total == 0
        await eventually(lambda: nothing_held(stack))


@pytest.mark.slow
async def test_an_urgent_request_displaces_one_that_waits_for_kv(
    pair: Pair, redis_url: str, greedy: Greedy, brake: Brake, admissions: list[AdmissionQueue]
) -> None:
    """The queue is full of requests without room: the least urgent is rejected, others succeed."""
    prompts = [[n] * 480 for n in range(5)]
    async with (
        both_tiers(pair, target_kv=1_024) as tiers,
        orchestrating(tiers, redis_url, max_waiting=2) as stack,
    ):
        brake.set(1)

        async def ask(number: int, priority: int) -> list[int]:
            asked = stack.generate(prompts[number], sampling=SHORT, gamma=0, priority=priority)
            return (await asked).token_ids

        asking = []
        for number in range(4):  # two run; two wait for KV room
            asking.append(asyncio.create_task(ask(number, 0)))
            await so_many_run(stack, min(number + 1, 2))
            await so_many_wait(admissions, max(0, number - 1))
        urgent = asyncio.create_task(ask(4, -5))
        displaced = await refusal(asking[3])
        assert displaced.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert displaced.retry_after_s is not None
        assert "more urgent" in displaced.message
        await eventually(lambda: _one_has_made_room(stack))
        brake.release()
        for number, task in enumerate([*asking[:3], urgent]):
            prompt = prompts[number if number < 3 else 4]
            assert await task == greedy(prompt, 4)
        await eventually(lambda: nothing_held(stack))


@pytest.mark.slow
@pytest.mark.parametrize("right", [None, -(2**31)])
async def test_a_key_preempts_others_only_if_allowed(
    right: int | None, pair: Pair, redis_url: str, greedy: Greedy, brake: Brake, tmp_path: Path,
    admissions: list[AdmissionQueue],
) -> None:  # fmt: skip
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(), bob=KeyLimits(1, min_priority=right))
    headers = {name: (("x-api-key", key),) for name, key in keys.items()}
    async with (
        both_tiers(pair, target_kv=1_024) as tiers,
        orchestrating(tiers, redis_url, api_keys_file=str(tmp_path / "keys")) as stack,
    ):
        brake.set(1)

        async def ask(prompt: list[int], key: str, priority: int) -> list[int]:
            asked, output = request(prompt, SHORT, gamma=0, priority=priority), Output()
            async for chunk in stack.client.Generate(
                asked, timeout=TIMEOUT_S, metadata=headers[key]
            ):
                output.add(chunk)
            return output.token_ids

        prompts = [[n] * 480 for n in range(3)]
        asking = [asyncio.create_task(ask(prompt, "ada", 0)) for prompt in prompts[:2]]
        await so_many_run(stack, 2)
        await eventually(lambda: _so_many_tokens(stack, 960))
        asking.append(asyncio.create_task(ask(prompts[2], "bob", -(2**31))))
        if right is None:
            await so_many_wait(admissions, 1)
        else:
            await eventually(lambda: _one_has_made_room(stack))
        brake.release()
        for prompt, task in zip(prompts, asking, strict=True):
            assert await task == greedy(prompt, 4)
        assert ((await stack.target_load()).num_preempted_total > 0) == (right is not None)


async def _so_many_tokens(stack: Stack, count: int) -> bool:
    """Run through the target."""
    return (await stack.target_load()).num_tokens_total >= count


async def test_a_resumed_request_has_its_own_priority(pair: Pair, redis_url: str) -> None:
    async with whole(pair, redis_url, max_generations=1, max_waiting=1) as stack:
        fields: dict[str, Any] = {"session_id": "s", "create_session": True, "priority": 3}
        call = await begun(stack, {**GREEDY, "max_tokens": 40}, **fields)
        call.cancel()
        again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=1, priority=-1)
        output = Output()
        async for chunk in stack.client.Generate(again, timeout=TIMEOUT_S):
            output.add(chunk)
        assert len(output.token_ids) == 39
