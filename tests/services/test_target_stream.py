"""The target's stream without an orchestrator: whole decodes, and every kind of bad message."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from outrider.v1 import sampling_pb2, target_pb2
from tests.services.parts import CONTEXT_LEN, Greedy, Pair, System, both_tiers, clients
from tests.services.streams import Decoding, Stream, ids, raw, row, sizes, target_open
from tests.stack import eventually

PROMPT = [3, 1, 4, 1]
HEALTHY, BAD = 1, 2
Frame = target_pb2.VerifyRequest
Reason = target_pb2.RowError


@pytest.fixture
async def system(pair: Pair) -> AsyncIterator[System]:
    async with both_tiers(pair, target_kv=4096, draft_kv=None) as tiers, clients(tiers) as system:
        yield system


@contextlib.asynccontextmanager
async def verifying(system: System) -> AsyncIterator[Stream]:
    async with raw(system.target.Verify()) as stream:
        yield stream


async def test_decoding_without_an_orchestrator_is_greedy_decoding(
    system: System, greedy: Greedy
) -> None:
    """Several generations on one stream, rolled back at random positions."""
    async with verifying(system) as stream:
        prompts = [[n, 1, 2, 3] * (1 + 8 * n) for n in range(4)]
        decodings = [
            Decoding(stream, n + 1, prompt, greedy(prompt, 80)) for n, prompt in enumerate(prompts)
        ]
        opens = [
            target_open(n + 1, prompt_len=len(prompt), max_len=len(prompt) + 90)
            for n, prompt in enumerate(prompts)
        ]
        await stream.write(Frame(opens=opens))
        await asyncio.gather(*(decoding.run(60) for decoding in decodings))
        for prompt, decoding in zip(prompts, decodings, strict=True):
            assert decoding.output[:60] == greedy(prompt, 80)[:60]


NAN = sampling_pb2.SamplingParams(temperature=math.nan)
TOP_P = sampling_pb2.SamplingParams(top_p=0)
OUTSIDE = sampling_pb2.SamplingParams(allowed_token_ids=[256])
MIN_TOKENS = sampling_pb2.SamplingParams(min_tokens=5, max_tokens=4)

TWO_FORMATS = sampling_pb2.SamplingParams(
    structured_outputs=sampling_pb2.StructuredOutputs(regex="a", grammar="b")
)
BAD_OPENS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_len 0": ({"prompt_len": 0}, "max_len"),
    "prompt fills it": ({"prompt_len": 200}, "max_len"),
    "max_len 0": ({"max_len": 0}, "max_len"),
    "max_len beyond the context": ({"max_len": CONTEXT_LEN + 1}, "max_len"),
    "max_len absurd": ({"max_len": 2**32 - 1}, "max_len"),
    "both absurd": ({"max_len": 2**32 - 1, "prompt_len": 2**32 - 2}, "max_len"),
    "temperature NaN": ({"sampling": NAN}, "temperature"),
    "top_p 0": ({"sampling": TOP_P}, "top_p"),
    "tokens out of range": ({"sampling": OUTSIDE}, "allowed_token_ids"),
    "min_tokens": ({"sampling": MIN_TOKENS}, "min_tokens"),
    "two formats": ({"sampling": TWO_FORMATS}, "structured_outputs"),
}
# A good one is row(BAD, 0, PROMPT, [5, 6], sizes [2, 1], ids [1, 2, 3]).
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"context_token_ids": b""}, "context_token_ids"),
    "half a token": ({"context_token_ids": b"\1\0\0"}, "context_token_ids"),
    "half a draft token": ({"draft_token_ids": b"\1\0\0\0\0"}, "draft_token_ids"),
    "token out of range": ({"context_token_ids": ids([256])}, "token_ids"),
    "token absurd": ({"context_token_ids": ids([2**32 - 1])}, "token_ids"),
    "draft out of range": ({"draft_token_ids": ids([5, 256])}, "token_ids"),
    "too many drafts": (
        {"draft_token_ids": ids([5] * 17), "support_sizes": b"", "support_ids": b""},
        "draft_token_ids",
    ),
    "more than max_len": ({"context_token_ids": ids([1] * 199)}, "max_len"),
    "keep_len absurd": ({"keep_len": 2**32 - 1}, "max_len"),
    "half a size": ({"support_sizes": b"\1\0\1"}, "support_sizes"),
    "too few sizes": ({"support_sizes": sizes([3])}, "support_sizes"),
    "too many sizes": ({"support_sizes": sizes([1, 1, 1])}, "support_sizes"),
    "sizes too small": ({"support_sizes": sizes([1, 1])}, "support_sizes"),
    "sizes too large": ({"support_sizes": sizes([2**16 - 1, 2**16 - 1])}, "support_sizes"),
    "sizes without ids": ({"support_ids": b""}, "support_sizes"),
    "ids without sizes": ({"support_sizes": b""}, "support"),
    "half an id": ({"support_ids": ids([1, 2]) + b"\1"}, "support_ids"),
    "id out of range": ({"support_ids": ids([1, 2, 256])}, "support_ids"),
    "id twice": ({"support_ids": ids([2, 2, 3])}, "support_ids"),
}


def good_row(**changed: Any) -> target_pb2.VerifyRow:
    fields = {"support_sizes": sizes([2, 1]), "support_ids": ids([1, 2, 3]), "keep_len": 0}
    fields |= {"draft_token_ids": ids([5, 6]), "context_token_ids": ids(PROMPT), **changed}
    return target_pb2.VerifyRow(generation_id=BAD, **fields)


@contextlib.asynccontextmanager
async def beside_a_healthy_one(system: System, greedy: Greedy) -> AsyncIterator[Stream]:
    """Another generation is decoded before, during and after the block."""
    async with verifying(system) as stream:
        healthy = Decoding(stream, HEALTHY, PROMPT, greedy(PROMPT, 80))
        await stream.write(Frame(opens=[target_open(HEALTHY)]))
        await healthy.run(10)
        running = asyncio.create_task(healthy.run(30))
        yield stream
        await running
        await healthy.run(50)
        assert healthy.output[:50] == greedy(PROMPT, 50)
        await eventually(lambda: _only_one_is_open(system))  # the bad one is closed
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=HEALTHY)]))
        await eventually(lambda: _nothing_is_held(system))


async def _only_one_is_open(system: System) -> bool:
    return (await system.target_load()).num_open_generations == 1


async def _nothing_is_held(system: System) -> bool:
    load = await system.target_load()
    return (load.num_open_generations, load.num_waiting_rows, load.kv_used_tokens) == (0, 0, 0)


async def _refused(stream: Stream, generation_id: int = BAD) -> target_pb2.RowError:
    answer = await stream.answer(generation_id)
    assert isinstance(answer, target_pb2.RowError), answer
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_OPENS)
async def test_bad_opens(name: str, system: System, greedy: Greedy) -> None:
    fields, said = BAD_OPENS[name]
    async with beside_a_healthy_one(system, greedy) as stream:
        await stream.write(Frame(opens=[target_open(BAD, **fields)]))
        error = await _refused(stream)
        assert (error.reason, said in error.detail) == (Reason.REASON_BAD_ROW, True), error


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_ROWS)
async def test_bad_rows(name: str, system: System, greedy: Greedy) -> None:
    changed, said = BAD_ROWS[name]
    async with beside_a_healthy_one(system, greedy) as stream:
        await stream.write(Frame(opens=[target_open(BAD)], rows=[good_row()]))
        assert isinstance(await stream.answer(BAD), target_pb2.VerifyResult)
        await stream.write(Frame(rows=[good_row(**changed)]))
        error = await _refused(stream)
        assert (error.reason, said in error.detail) == (Reason.REASON_BAD_ROW, True), error
        await stream.write(Frame(rows=[good_row()]))
        error = await _refused(stream)
        assert "not open" in error.detail


async def test_a_request_of_an_unknown_generation(system: System, greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, greedy) as stream:
        for number in (0, 99, 2**32 - 1):
            await stream.write(Frame(rows=[row(number, 0, PROMPT)]))
            assert (await _refused(stream, number)).reason == Reason.REASON_BAD_ROW


async def test_a_second_request_while_one_waits(system: System, greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, greedy) as stream:
        await stream.write(Frame(opens=[target_open(BAD)], rows=[good_row(), good_row()]))
        error = await _refused(stream)
        assert (error.reason, "not answered" in error.detail) == (Reason.REASON_BAD_ROW, True)


async def test_open_twice(system: System, greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, greedy) as stream:
        await stream.write(Frame(opens=[target_open(BAD), target_open(BAD, session_id="other")]))
        error = await _refused(stream)
        assert (error.reason, "already open" in error.detail) == (Reason.REASON_BAD_ROW, True)


async def test_lost_keys_and_values_are_sent_again(system: System, greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, greedy) as stream:
        await stream.write(Frame(opens=[target_open(BAD)], rows=[row(BAD, 5, PROMPT)]))
        assert (await _refused(stream)).reason == Reason.REASON_KV_LOST
        again = Decoding(stream, BAD, PROMPT, greedy(PROMPT, 40))
        await again.run(20)
        assert again.output[:20] == greedy(PROMPT, 20)
        await stream.write(Frame(rows=[row(BAD, 150, [1])]))
        assert (await _refused(stream)).reason == Reason.REASON_KV_LOST
        await again.run(30)
        assert again.output[:30] == greedy(PROMPT, 30)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=BAD)]))


async def test_no_room(system: System, greedy: Greedy) -> None:
    """No room for a request now, or never; `max_len` alone reserves nothing."""
    async with beside_a_healthy_one(system, greedy) as stream:
        long = {n: [n] * 2_040 for n in (5, BAD, 6)}
        opens = [target_open(n, prompt_len=2_040, max_len=CONTEXT_LEN) for n in long]
        await stream.write(Frame(opens=opens[:2], rows=[row(n, 0, long[n]) for n in (5, BAD)]))
        assert (await _refused(stream)).reason == Reason.REASON_KV_FULL
        assert isinstance(await stream.answer(5), target_pb2.VerifyResult)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=5)]))
        await stream.write(Frame(opens=opens[2:], rows=[row(6, 0, long[6])]))
        assert isinstance(await stream.answer(6), target_pb2.VerifyResult)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=6)]))


async def test_a_generation_longer_than_the_kv_cache_is_refused(pair: Pair) -> None:
    """When it is opened, before any request: waiting would not help."""
    async with (
        both_tiers(pair, target_kv=512, draft_kv=None) as tiers,
        clients(tiers) as system,
        verifying(system) as stream,
    ):
        opens = [target_open(n, max_len=max_len) for n, max_len in ((1, 512), (BAD, 513))]
        await stream.write(Frame(opens=opens))
        refused = await _refused(stream)
        assert refused.reason == Reason.REASON_KV_NEVER
        assert "513 exceeds the KV cache of 512 tokens" in refused.detail
        await stream.write(Frame(rows=[row(1, 0, PROMPT)]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)


async def test_no_more_are_open_than_there_are_pages(pair: Pair) -> None:
    """Open generations without requests still cost the service memory."""
    async with (
        both_tiers(pair, target_kv=64, draft_kv=None) as tiers,
        clients(tiers) as system,
        verifying(system) as stream,
    ):
        opens = [target_open(n, max_len=64) for n in range(3, 8)]
        await stream.write(Frame(opens=opens))
        refused = await _refused(stream, 7)
        assert (refused.reason, "4 generations" in refused.detail) == (Reason.REASON_KV_FULL, True)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=3)]))
        await stream.write(Frame(opens=[target_open(8, max_len=64)], rows=[row(8, 0, PROMPT)]))
        assert isinstance(await stream.answer(8), target_pb2.VerifyResult)


@pytest.mark.parametrize("epoch", [1, 4])
async def test_an_older_epoch_is_refused(epoch: int, system: System, greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, greedy) as stream, verifying(system) as other:
        await stream.write(Frame(opens=[target_open(5, session_id="s", epoch=5)]))
        await stream.write(Frame(rows=[row(5, 0, PROMPT)]))
        await stream.answer(5)
        await other.write(Frame(opens=[target_open(BAD, session_id="s", epoch=epoch)]))
        assert (await _refused(other)).reason == Reason.REASON_DISPLACED
        holder = Decoding(stream, 5, PROMPT, greedy(PROMPT, 20))
        await holder.run(10)
        assert holder.output[:10] == greedy(PROMPT, 10)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=5)]))


async def test_a_newer_epoch_displaces(system: System, greedy: Greedy) -> None:
    """The older one fails with DISPLACED, and its KV is freed for the newer one."""
    async with beside_a_healthy_one(system, greedy) as stream, verifying(system) as other:
        await stream.write(Frame(opens=[target_open(BAD, session_id="s", epoch=5)]))
        await stream.write(Frame(rows=[row(BAD, 0, PROMPT)]))
        await stream.answer(BAD)
        await other.write(Frame(opens=[target_open(5, session_id="s", epoch=6)]))
        error = await _refused(stream)
        assert (error.reason, "epoch 6" in error.detail) == (Reason.REASON_DISPLACED, True)
        newer = Decoding(other, 5, PROMPT, greedy(PROMPT, 20))
        await newer.run(10)
        assert newer.output[:10] == greedy(PROMPT, 10)
        await other.write(Frame(closes=[target_pb2.TargetClose(generation_id=5)]))
        await stream.write(Frame(rows=[row(BAD, 0, PROMPT)]))
        assert "not open" in (await _refused(stream)).detail


async def test_huge_counts(system: System, greedy: Greedy) -> None:
    """Thousands of items of each kind in one frame: each is answered, and the service goes on."""
    async with beside_a_healthy_one(system, greedy) as stream:

        def count(start: int) -> list[int]:
            return list(range(start, start + 3000))

        await stream.write(
            Frame(
                opens=[target_open(n, max_len=2**32 - 1) for n in count(10_000)],
                rows=[row(n, 0, [1]) for n in count(20_000)],
                closes=[target_pb2.TargetClose(generation_id=n) for n in count(30_000)],
                forget_session_ids=[f"nobody-{n}" for n in count(0)],
            )
        )
        for number in (*count(10_000), *count(20_000)):
            assert (await _refused(stream, number)).reason == Reason.REASON_BAD_ROW
