"""Prefix cache of both tiers through the real services: common prefixes run once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from outrider.model_server import scheduler
from outrider.v1 import draft_pb2, target_pb2
from tests.services.parts import GREEDY, Greedy, Pair, System, both_tiers, clients, nothing_held
from tests.services.streams import (
    Decoding,
    Following,
    Stream,
    draft_open,
    numbers,
    raw,
    row,
    target_open,
)
from tests.stack import Stack, eventually, running_stack

PAGE = 16
SYSTEM = [(7 * n + n * n) % 251 for n in range(100)]
Verify, Propose = target_pb2.VerifyRequest, draft_pb2.ProposeRequest


@pytest.fixture(autouse=True)
def _checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle services check their KV accounting all the time; an error ends the service."""
    monkeypatch.setattr(scheduler, "TIDY_INTERVAL_S", 0.02)


@contextlib.asynccontextmanager
async def target_alone(pair: Pair, kv: int = 4096, **settings: Any) -> AsyncIterator[System]:
    async with (
        both_tiers(pair, target_kv=kv, draft_kv=None, **settings) as tiers,
        clients(tiers) as system,
    ):
        yield system


@contextlib.asynccontextmanager
async def whole(pair: Pair, redis_url: str, **tier: Any) -> AsyncIterator[Stack]:
    async with running_stack(
        pair.target, pair.draft, redis_url, target_settings=tier, draft_settings=tier
    ) as stack:
        yield stack


async def first_row(
    stream: Stream, number: int, prompt: list[int], **opening: Any
) -> target_pb2.VerifyResult:
    fields = {"prompt_len": len(prompt), "max_len": len(prompt) + 60, **opening}
    await stream.write(Verify(opens=[target_open(number, **fields)], rows=[row(number, 0, prompt)]))
    answer = await stream.answer(number)
    assert isinstance(answer, target_pb2.VerifyResult), answer
    return answer


def closing(number: int, *, keep: bool = False) -> target_pb2.VerifyRequest:
    return Verify(closes=[target_pb2.TargetClose(generation_id=number, keep=keep)])


async def test_a_second_request_runs_only_new_tokens(pair: Pair, greedy: Greedy) -> None:
    """While the first is open, and after it. Full pages are reused, but never the last token."""
    async with target_alone(pair) as system, raw(system.target.Verify()) as stream:
        for number, (prompt, num_found) in enumerate(
            [
                (SYSTEM, 0),
                (SYSTEM, 96),
                ([*SYSTEM, 1, 2, 3], 96),
                (SYSTEM[:97], 96),
                (SYSTEM[:96], 80),
                ([*SYSTEM[:50], 9, *SYSTEM[51:]], 48),
                ([9, *SYSTEM], 0),
                (SYSTEM[:12], 0),
            ],
            start=1,
        ):
            before = await system.target_load()
            answer = await first_row(stream, number, prompt)
            load = await system.target_load()
            assert answer.num_reused_tokens == num_found
            assert numbers(answer.sample_ids) == greedy(prompt, 1)
            counted = {
                name: getattr(load, name) - getattr(before, name)
                for name in (
                    "num_prefix_queried_tokens_total",
                    "num_prefix_hit_tokens_total",
                    "num_prefill_tokens_total",
                )
            }
            assert list(counted.values()) == [len(prompt), num_found, len(prompt) - 1 - num_found]
            if number == 1:
                continue  # it stays open
            await stream.write(closing(number))
        await stream.write(closing(1))
        await eventually(lambda: nothing_held(system))
        assert (await first_row(stream, 99, SYSTEM)).num_reused_tokens == 96


async def test_equal_prompts_that_arrive_together_are_run_once(pair: Pair, greedy: Greedy) -> None:
    """Those that wait for a pass find what the first one has cached by then."""
    async with (
        target_alone(pair, max_step_tokens=128) as system,
        raw(system.target.Verify()) as stream,
    ):
        prompts = [[*SYSTEM, n, n] for n in range(1, 6)]
        opens = [target_open(n, prompt_len=102, max_len=140) for n in range(1, 6)]
        rows = [row(n, 0, prompt) for n, prompt in enumerate(prompts, 1)]
        await stream.write(Verify(opens=opens, rows=rows))
        answers = [await stream.answer(n) for n in range(1, 6)]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert numbers(answer.sample_ids) == greedy(prompt, 1)
        # One pass has room for the first prompt and a part of the second.
        assert sum(answer.num_reused_tokens == 96 for answer in answers) >= 3


@pytest.mark.slow
async def test_decoding_continues_from_a_cached_prefix(pair: Pair, greedy: Greedy) -> None:
    """Rolled back at random positions, several at once with a common prefix."""
    prompts = [[*SYSTEM, n] for n in range(4)]
    async with target_alone(pair, kv=1024) as system, raw(system.target.Verify()) as stream:
        for start in (1, 11, 21):
            numbered = list(enumerate(prompts, start))
            runs = [Decoding(stream, n, prompt, greedy(prompt, 80)) for n, prompt in numbered]
            opens = [target_open(n, prompt_len=101, max_len=190) for n, _ in numbered]
            await stream.write(Verify(opens=opens))
            await asyncio.gather(*(run.run(60) for run in runs))
            for prompt, run in zip(prompts, runs, strict=True):
                assert run.output[:60] == greedy(prompt, 60)
            for n, _ in numbered:
                await stream.write(closing(n))
        await eventually(lambda: nothing_held(system))
        load = await system.target_load()
        # Four reservations take most of the KV: some cached pages are evicted.
        assert load.num_prefix_hit_tokens_total >= 3 * 96
        # Generated tokens are found as well.
        said = [*prompts[0], *greedy(prompts[0], 60)]
        answer = await first_row(stream, 99, said)
        assert answer.num_reused_tokens >= 101 + 40
        assert numbers(answer.sample_ids) == greedy(said, 1)


async def test_rejected_draft_tokens_are_not_cached(pair: Pair, greedy: Greedy) -> None:
    """Only tokens that the orchestrator sent as context are cached."""
    prompt, wrong = SYSTEM[:30], [(t + 1) % 256 for t in greedy(SYSTEM[:30], 16)]
    async with target_alone(pair) as system, raw(system.target.Verify()) as stream:
        opening = target_open(1, prompt_len=30, max_len=80)
        await stream.write(Verify(opens=[opening], rows=[row(1, 0, prompt, wrong)]))
        await stream.answer(1)
        await stream.write(closing(1, keep=True))
        answer = await first_row(stream, 2, [*prompt, *wrong])
        assert answer.num_reused_tokens == 16
        assert numbers(answer.sample_ids) == greedy([*prompt, *wrong], 1)


async def test_an_evicted_session_is_found_by_its_tokens(pair: Pair, greedy: Greedy) -> None:
    """The session is gone, so the context is sent again; its cached pages need not be run again."""
    async with target_alone(pair) as system, raw(system.target.Verify()) as stream:
        await first_row(stream, 1, SYSTEM, session_id="s")
        await stream.write(closing(1, keep=True))
        await stream.write(Verify(forget_session_ids=["s"]))
        await eventually(lambda: nothing_held(system))
        opening = target_open(2, session_id="s", epoch=2, kept_epoch=1, prompt_len=110, max_len=150)
        context = [*SYSTEM, *range(10)]
        await stream.write(Verify(opens=[opening], rows=[row(2, 100, context[100:])]))
        assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_KV_LOST
        await stream.write(Verify(rows=[row(2, 0, context)]))
        answer = await stream.answer(2)
        assert answer.num_reused_tokens == 96
        assert numbers(answer.sample_ids) == greedy(context, 1)


async def test_the_draft_runs_only_new_tokens(pair: Pair) -> None:
    """While the first is open, and after it; proposals are greedy continuations."""
    truth = Greedy(pair.draft)
    async with both_tiers(pair) as tiers, clients(tiers) as system:
        assert system.draft is not None
        async with raw(system.draft.Propose()) as stream:
            for number, num_found in ((1, 0), (2, 96), (3, 96)):
                before = await system.draft_load()
                prompt = [*SYSTEM, number]
                opening = draft_open(number, prompt, lookahead=2, fan_out=4, max_len=190)
                await stream.write(Propose(opens=[opening]))
                await Following(stream, number, prompt, truth).run(12)
                load = await system.draft_load()
                hits = load.num_prefix_hit_tokens_total - before.num_prefix_hit_tokens_total
                done = load.num_prefill_tokens_total - before.num_prefill_tokens_total
                assert hits == num_found
                # The first commit may come before the first pass, and is context then.
                assert done <= len(prompt) - num_found + 2
                if number == 2:
                    closes = [draft_pb2.DraftClose(generation_id=n) for n in (1, 2)]
                    await stream.write(Propose(closes=closes))
                    await eventually(lambda: nothing_held(system))


@pytest.mark.slow
@pytest.mark.parametrize("is_on", [True, False])
async def test_outputs_are_the_same_with_and_without_the_cache(
    is_on: bool, pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """Through the whole system, one after another and many at a time."""
    prompts = [[*SYSTEM, n, 3, n] for n in range(6)]
    async with whole(pair, redis_url, prefix_cache=is_on) as stack:
        asked = {"sampling": {**GREEDY, "max_tokens": 30}, "gamma": 4}
        outputs = [await stack.generate(prompts[0], **asked) for _ in range(2)]
        outputs += await asyncio.gather(*(stack.generate(p, **asked) for p in prompts))
        await eventually(lambda: nothing_held(stack))
        for prompt, output in zip([*prompts[:1] * 2, *prompts], outputs, strict=True):
            assert output.token_ids == greedy(prompt, 30)
        for load in (await stack.target_load(), await stack.draft_load()):
            if is_on:
                # A draft that receives the first tokens before its first pass looks them up, too.
                assert 8 * 103 <= load.num_prefix_queried_tokens_total <= 8 * 103 + 8 * 5
                assert load.num_prefix_hit_tokens_total == 7 * 96
                assert load.num_prefill_tokens_total <= 8 * (103 + 5) - 7 * 96
            else:
                assert load.num_prefix_hit_tokens_total == 0


@pytest.mark.slow
async def test_outputs_are_right_while_prefixes_are_evicted(
    pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """KV for a few generations: prefixes are evicted and cached again."""
    rng = random.Random(5)
    prompts = [
        [*SYSTEM[: rng.randrange(100)], *(rng.randrange(255) for _ in range(30))] for _ in range(12)
    ]
    asked = {"sampling": {**GREEDY, "max_tokens": 24}, "gamma": 3}
    async with whole(pair, redis_url, kv_cache_tokens=512) as stack:
        for _ in range(3):
            rng.shuffle(prompts)
            for two in (prompts[:6:2], prompts[1::3]):
                outputs = [await stack.generate(p, **asked) for p in two]
                assert [o.token_ids for o in outputs] == [greedy(p, 24) for p in two]
        await eventually(lambda: nothing_held(stack))
        load = await stack.target_load()
        assert 0 < load.num_prefix_hit_tokens_total < load.num_prefix_queried_tokens_total


async def test_simulated_tiers_skip_cached_prefixes(redis_url: str) -> None:
    """The same without a model: prefill takes as much less time."""
    prompt = [n % 997 for n in range(408)]
    tier = {"kv_cache_tokens": 8_192}
    async with running_stack(
        None,
        None,
        redis_url,
        target_settings=tier | {"simulate": "step_ms=1,vocab_size=1000"},
        draft_settings=tier | {"simulate": "step_ms=0.2,vocab_size=1000"},
    ) as stack:
        # A γ of its own: by costs drafts may seem to be worth nothing, and no draft is asked.
        asked: dict[str, Any] = {"sampling": {**GREEDY, "max_tokens": 12}, "gamma": 4}
        outputs = [await stack.generate(prompt, **asked) for _ in range(2)]
        assert outputs[0].token_ids == outputs[1].token_ids
        await eventually(lambda: nothing_held(stack))
        for load in (await stack.target_load(), await stack.draft_load()):
            assert load.num_prefix_hit_tokens_total == 400
            # A draft that receives the first token before its first pass runs that token too.
            assert load.num_prefill_tokens_total <= 408 + 8 + 2
