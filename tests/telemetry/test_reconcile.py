"""Counters equal what clients received, to the token: under load, dead draft, clients gone.

For a call that was cut off only the server knows what it sent last. The count must lie between
the tokens its client received and the tokens recorded in Redis.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.stack import Output, eventually, request
from tests.telemetry.parts import Scrape, Services, positions, prompt, scrape, services

ORIGINS = {
    orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED: "accepted",
    orchestrator_pb2.TOKEN_ORIGIN_RECOVERED: "recovered",
    orchestrator_pb2.TOKEN_ORIGIN_BONUS: "bonus",
    orchestrator_pb2.TOKEN_ORIGIN_PLAIN: "plain",
}
WAYS: list[tuple[dict[str, Any], int]] = [
    ({"temperature": 0}, sampling_pb2.VERIFICATION_REJECTION),
    ({"temperature": 1}, sampling_pb2.VERIFICATION_REJECTION),
    ({"temperature": 1}, sampling_pb2.VERIFICATION_BLOCK),
    ({"temperature": 1}, sampling_pb2.VERIFICATION_COUPLED),
]
NUM_CLIENTS = 8
HELD = 6


async def to_its_end(system: Services, number: int, **fields: Any) -> Output:
    sampling, verification = WAYS[number % len(WAYS)]
    asked = {"ignore_eos": True, "max_tokens": 32 + 5 * number, "seed": number, **sampling}
    output = Output()
    async for chunk in system.client.Generate(
        request(prompt(number), asked, verification=verification, **fields), timeout=150
    ):
        output.add(chunk)
    return output


async def cut_off(system: Services, session_id: str) -> int:
    """Number of tokens its client has received when it disconnects."""
    sampling = {"ignore_eos": True, "max_tokens": 20_000, "temperature": 0}
    asked = request(prompt(1), sampling, session_id=session_id, create_session=True)
    call, num = system.client.Generate(asked, timeout=150), 0
    async for chunk in call:
        num += len(chunk.token_ids)
        if num >= HELD:
            break
    call.cancel()
    return num


async def num_recorded(system: Services, session_id: str) -> int:
    """Recorded tokens after the call has released the session."""
    asked = orchestrator_pb2.GetSessionRequest(session_id=session_id)

    async def is_free() -> bool:
        return not (await system.client.GetSession(asked)).in_use

    await eventually(is_free)
    return int((await system.client.GetSession(asked)).num_emitted_tokens)


def origins(outputs: Sequence[Output]) -> dict[str, float]:
    counted = Counter(origin for output in outputs for origin in output.origins)
    return {name: float(counted[origin]) for origin, name in ORIGINS.items()}


def tokens(exposed: Scrape) -> dict[str, float]:
    return exposed.by("outrider_tokens_total", "origin")


def assert_sent(exposed: Scrape, outputs: Sequence[Output]) -> None:
    """Compares the counters with the results that the clients received."""
    results = [output.result for output in outputs if output.result is not None]
    speculations = [result.speculation for result in results]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    assert tokens(exposed) == origins(outputs)
    assert (
        exposed("outrider_generation_tokens_total") == num_tokens == sum(tokens(exposed).values())
    )
    assert exposed("outrider_prompt_tokens_total") == sum(r.usage.prompt_tokens for r in results)
    for metric, field in (
        ("spec_decode_num_drafts", "num_drafts"),
        ("spec_decode_num_draft_tokens", "num_draft_tokens"),
        ("spec_decode_num_accepted_tokens", "num_accepted_tokens"),
        ("spec_decode_num_rejected_tokens", "num_rejected_tokens"),
    ):
        total = sum(getattr(speculation, field) for speculation in speculations)
        assert exposed(f"outrider_{metric}_total") == total, metric
    assert exposed.by("outrider_spec_decode_num_accepted_tokens_per_pos_total", "position") == (
        positions([speculation.num_accepted_tokens_per_pos for speculation in speculations])
    )
    by_gamma = exposed.by("outrider_rounds_total", "gamma")
    assert sum(by_gamma.values()) == sum(s.num_rounds for s in speculations)
    assert exposed("outrider_spec_decode_num_accepted_tokens_total") == tokens(exposed)["accepted"]
    hits = sum(speculation.num_lookahead_hits for speculation in speculations)
    assert exposed("outrider_lookahead_rounds_total", outcome="hit") == hits


def assert_timed(exposed: Scrape, outputs: Sequence[Output]) -> None:
    num, num_chunks = len(outputs), sum(len(output.texts) for output in outputs)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert exposed(f"outrider_{name}_seconds_count") == num, name
        assert exposed(f"outrider_{name}_seconds_bucket", le="+Inf") == num, name
        assert exposed(f"outrider_{name}_seconds_sum") > 0, name
    assert exposed("outrider_inter_token_latency_seconds_count") == num_chunks - num
    sent = sum(len(output.token_ids) for output in outputs)
    assert exposed("outrider_request_generation_tokens_sum") == sent
    assert exposed("outrider_requests_total", status="OK") == num
    assert exposed("outrider_request_success_total", finished_reason="length") == num
    assert exposed("outrider_num_requests_running") == exposed("outrider_num_requests_waiting") == 0


async def ended(system: Services, num: int) -> Scrape:
    """A scrape after `num` calls are counted; the client sees the last chunk slightly earlier."""

    async def has_counted() -> bool:
        exposed = await scrape(system.orchestrator)
        is_idle = exposed("outrider_num_requests_running") == 0
        return is_idle and sum(exposed.by("outrider_requests_total", "status").values()) == num

    await eventually(has_counted)
    return await scrape(system.orchestrator)


@pytest.mark.slow
async def test_finished_calls_reconcile_to_the_token(redis_url: str) -> None:
    """The draft dies while they run: accepted tokens before, plain tokens after."""
    async with services(redis_url, {"metrics_port": 0}) as system:
        assert system.draft is not None
        running = [asyncio.create_task(to_its_end(system, number)) for number in range(NUM_CLIENTS)]
        outputs = [await to_its_end(system, 0), await to_its_end(system, 1)]
        await system.draft.grpc_server.stop(None)
        outputs += [await task for task in running]
        outputs += await asyncio.gather(*(to_its_end(system, n) for n in range(3)))
        exposed = await ended(system, len(outputs))
        assert_sent(exposed, outputs)
        assert_timed(exposed, outputs)
        assert tokens(exposed)["plain"] > 0
        assert tokens(exposed)["accepted"] > 0
        assert tokens(exposed)["bonus"] > 0
        assert tokens(exposed)["recovered"] > 0


async def test_calls_that_are_cut_off_count_what_was_sent(redis_url: str) -> None:
    """Received tokens <= counted tokens <= recorded tokens."""
    names = [f"session-{number}" for number in range(4)]
    async with services(redis_url, {"metrics_port": 0}) as system:
        beside = asyncio.gather(*(to_its_end(system, number) for number in range(3)))
        received = await asyncio.gather(*(cut_off(system, name) for name in names))
        recorded = [await num_recorded(system, name) for name in names]
        outputs = await beside
        exposed = await ended(system, len(names) + len(outputs))
        num_sent = exposed("outrider_generation_tokens_total")
        num_sent -= sum(len(output.token_ids) for output in outputs)
        assert sum(received) <= num_sent <= sum(recorded)
        assert sum(tokens(exposed).values()) == exposed("outrider_generation_tokens_total")
        assert (
            exposed("outrider_spec_decode_num_accepted_tokens_total") == tokens(exposed)["accepted"]
        )
        assert exposed.counted("outrider_requests_total", "status") == {
            "OK": len(outputs),
            "CANCELLED": len(names),
        }
        assert exposed.by("outrider_request_success_total", "finished_reason") == {
            "length": len(outputs),
            "abort": len(names),
            "stop": 0,
        }


@pytest.mark.slow
async def test_a_resumed_call_counts_only_what_it_generates(redis_url: str) -> None:
    """Recorded tokens that are sent again were counted where they were generated."""
    asked = request(
        prompt(5),
        {"temperature": 0, "ignore_eos": True, "max_tokens": 400},
        session_id="resumed",
        create_session=True,
    )
    async with services(redis_url, {"metrics_port": 0}) as system:
        call, first = system.client.Generate(asked, timeout=150), Output()
        async for chunk in call:
            first.add(chunk)
            if len(first.token_ids) >= HELD:
                break
        call.cancel()
        await num_recorded(system, "resumed")
        before = await ended(system, 1)
        # As if all but one token had been lost on the way.
        again = orchestrator_pb2.GenerateRequest(session_id="resumed", resume_from=1)
        second = Output()
        async for chunk in system.client.Generate(again, timeout=150):
            second.add(chunk)
        after = await ended(system, 2)
    assert len(second.token_ids) == 399
    num_replayed = second.origins.count(orchestrator_pb2.TOKEN_ORIGIN_UNSPECIFIED)
    assert num_replayed >= HELD - 1
    assert before("outrider_replayed_tokens_total") == 0
    assert after("outrider_replayed_tokens_total") == num_replayed
    added = {name: num - tokens(before)[name] for name, num in tokens(after).items()}
    assert added == origins([second])
    assert sum(added.values()) == 399 - num_replayed


async def test_refused_calls_are_counted_by_their_status(redis_url: str) -> None:
    """They count neither as running nor as finished."""
    async with services(redis_url, {"metrics_port": 0}, has_draft=False, gamma=0) as system:
        for asked, status in (
            (request(prompt(0), {"temperature": -1}), "INVALID_ARGUMENT"),
            (request(prompt(0), session_id="nobody"), "NOT_FOUND"),
        ):
            code = await _code(system.client.Generate(asked, timeout=150))
            assert code.name == status
        exposed = await ended(system, 2)
    assert exposed.counted("outrider_requests_total", "status") == {
        "INVALID_ARGUMENT": 1,
        "NOT_FOUND": 1,
    }
    assert sum(exposed.by("outrider_request_success_total", "finished_reason").values()) == 0
    assert exposed("outrider_time_to_first_token_seconds_count") == 0


async def _code(call: Any) -> grpc.StatusCode:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    raise AssertionError("it was refused")
