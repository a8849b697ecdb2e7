"""Simulated tiers behind the real services: the same answers, the acceptance that was asked for.

Statistical tests are two-sided and exact (binomial). Prompts and seeds are fixed and every round
waits for its draft, so a test that passes passes always; its false-alarm probability, 1e-6, is that
of a choice of seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from scipy import stats

from outrider.engine.interface import SampleRequest
from outrider.engine.simulated import SimulatedEngine
from outrider.sampling.params import SamplingParams, Verification
from outrider.settings.simulation import Simulation
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.services.parts import GREEDY, nothing_held, refusal
from tests.stack import Output, Stack, eventually, running_stack

FALSE_ALARM = 1e-6
VOCAB_SIZE = 1_000
SURVIVAL = (0.9, 0.6, 0.3, 0.8)
SAMPLED: dict[str, Any] = {"temperature": 1, "ignore_eos": True}
ACCEPTED = orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED
RECOVERED = orchestrator_pb2.TOKEN_ORIGIN_RECOVERED
BONUS = orchestrator_pb2.TOKEN_ORIGIN_BONUS
WAYS = [
    pytest.param(GREEDY, sampling_pb2.VERIFICATION_REJECTION, id="greedy"),
    pytest.param(SAMPLED, sampling_pb2.VERIFICATION_REJECTION, id="rejection"),
    pytest.param(SAMPLED, sampling_pb2.VERIFICATION_BLOCK, id="block"),
    pytest.param(SAMPLED, sampling_pb2.VERIFICATION_COUPLED, id="coupled"),
]


@contextlib.asynccontextmanager
async def simulated(
    redis_url: str,
    draft: str = f"step_ms=0.2,survival={'/'.join(map(str, SURVIVAL))}",
    target: str = "step_ms=2",
    *,
    kv_cache_tokens: int | None = 262_144,
) -> AsyncIterator[Stack]:
    """Quick tiers, so that what is tested is what they say and not what they take."""
    room = {"kv_cache_tokens": kv_cache_tokens}
    async with running_stack(
        None,
        None,
        redis_url,
        target_settings=room | {"simulate": f"{target},vocab_size={VOCAB_SIZE}"},
        draft_settings=room | {"simulate": f"{draft},vocab_size={VOCAB_SIZE}"},
    ) as stack:
        yield stack


def engine(**settings: Any) -> SimulatedEngine:
    return SimulatedEngine(Simulation(vocab_size=VOCAB_SIZE, **settings), 4_096)


def prompt(number: int) -> list[int]:
    """No two alike."""
    return [int(i) for i in np.random.default_rng(number).integers(0, VOCAB_SIZE, 12)]


def truth(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What follows, by the engine's own word."""
    teller, path = engine(), list(token_ids)
    for _ in range(num_tokens):
        path.append(teller.truth(len(path), path[-1]))
    return path[len(token_ids) :]


def rounds(output: Output) -> Iterator[tuple[int, bool]]:
    """Of each whole drafted round: how many draft tokens stood, and whether one was rejected."""
    num_accepted = 0
    for origin in output.origins:
        if origin == ACCEPTED:
            num_accepted += 1
        elif origin in (RECOVERED, BONUS):
            yield num_accepted, origin == RECOVERED
            num_accepted = 0


def assert_share(num: int, total: int, chance: float, alarm: float = FALSE_ALARM) -> None:
    """That `num` of `total` may come of this chance."""
    p_value = float(stats.binomtest(num, total, chance).pvalue)
    assert p_value > alarm, f"{num} of {total} at chance {chance:g}: p = {p_value:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "verification"), WAYS)
async def test_drafts_change_no_token(
    sampling: dict[str, Any], verification: int, redis_url: str
) -> None:
    """Any γ, chosen or given, any look-ahead and fan-out; and nothing is held afterwards."""
    settings = [*itertools.product((None, *range(9)), range(3), (1, 16))]
    asked = {**sampling, "max_tokens": 24}
    async with simulated(redis_url) as stack:
        outputs = await asyncio.gather(
            *(
                stack.generate(
                    prompt(number),
                    sampling=asked | {"seed": number},
                    gamma=gamma,
                    lookahead=lookahead,
                    fan_out=fan_out,
                    verification=verification,
                )
                for number, (gamma, lookahead, fan_out) in enumerate(settings)
            )
        )
        await eventually(lambda: nothing_held(stack))
    for number, (setting, output) in enumerate(zip(settings, outputs, strict=True)):
        assert output.token_ids == truth(prompt(number), 24), setting
        if setting[0]:
            assert output.speculation.num_draft_tokens > 0, setting
        if setting[0] == 0:
            assert output.speculation.num_draft_tokens == 0, setting


@pytest.mark.slow
@pytest.mark.parametrize(("sampling", "verification"), WAYS)
async def test_acceptance_is_as_asked_for(
    sampling: dict[str, Any], verification: int, redis_url: str
) -> None:
    """By position in the block, of some 5,000 draft tokens that were judged.

    The same number of rounds of every output, for the round that reaches max_tokens is longer than
    others are; and the first is left out: what of its draft is used depends on who was first.
    """
    num_outputs, num_rounds, gamma = 30, 60, len(SURVIVAL)
    asked = {**sampling, "max_tokens": (num_rounds + 1) * (gamma + 1) + 1}
    async with simulated(redis_url) as stack:
        outputs = await asyncio.gather(
            *(
                stack.generate(
                    prompt(number),
                    sampling=asked | {"seed": number},
                    gamma=gamma,
                    lookahead=0,
                    verification=verification,
                )
                for number in range(num_outputs)
            )
        )
    judged, accepted = Counter[int](), Counter[int]()
    for output in outputs:
        for stood, is_rejected in itertools.islice(rounds(output), 1, num_rounds + 1):
            judged.update(range(stood + is_rejected))
            accepted.update(range(stood))
    assert judged[0] == num_outputs * num_rounds
    for position, chance in enumerate(SURVIVAL):
        assert_share(accepted[position], judged[position], chance, FALSE_ALARM / gamma)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("survival", "ranks"), [((0.7,), (0.5, 0.2, 0.1)), ((0.5, 0.25), (1.0,)), ((0.0,), (0.6,))]
)
@pytest.mark.parametrize("verification", list(Verification))
def test_what_the_target_emits_has_its_rank(
    survival: tuple[float, ...], ranks: tuple[float, ...], verification: Verification
) -> None:
    """A rejected token's replacement is the draft's k-th other choice as often as `ranks` says."""
    draft = engine(survival=survival, ranks=ranks)
    sampler = draft.sampler(SamplingParams(), 8, VOCAB_SIZE)
    num_draws, index = 4_000, len(survival) - 1
    found = Counter[int | None]()
    for number in range(num_draws):
        history = np.array(prompt(number))
        position = len(history)
        ask = SampleRequest(
            sampler, lambda h=history: h, position, position - index, verification, False
        )
        (drawn,) = draft.sample([ask], None)
        assert not isinstance(drawn, Exception)
        others = [int(i) for i in drawn.candidate_ids if i != drawn.token_id]
        emitted = draft.truth(position, int(history[-1]))
        assert (np.diff(drawn.candidate_scores) <= 0).all()
        assert len({drawn.token_id, *others}) == len(drawn.candidate_ids)
        if emitted == drawn.token_id:
            found[0] += 1
        else:
            found[1 + others.index(emitted) if emitted in others else None] += 1
    alarm = FALSE_ALARM / (2 + len(ranks))
    stands = survival[-1]
    assert_share(found[0], num_draws, stands, alarm)
    for rank, chance in enumerate(ranks, 1):
        assert_share(found[rank], num_draws - found[0], chance, alarm)
    assert_share(found[None], num_draws - found[0], max(0.0, 1 - sum(ranks)), alarm)


@pytest.mark.slow
async def test_many_streams_at_a_time(redis_url: str) -> None:
    """200, each with the tokens of its own prompt; and nothing is held afterwards."""
    async with simulated(redis_url, "step_ms=0.2,row_ms=0.01", "step_ms=2,row_ms=0.02") as stack:
        outputs = await asyncio.gather(
            *(
                stack.generate(prompt(number), sampling={**GREEDY, "max_tokens": 16})
                for number in range(200)
            )
        )
        await eventually(lambda: nothing_held(stack))
        load = await stack.target_load()
    assert load.num_opened_total == load.num_closed_total == 200
    for number, output in enumerate(outputs):
        assert output.token_ids == truth(prompt(number), 16)


async def test_a_conversation_goes_on(redis_url: str) -> None:
    """The second turn continues the first one's tokens, whose KV is re-used."""
    asked = {**GREEDY, "max_tokens": 20}
    async with simulated(redis_url) as stack:
        named: dict[str, Any] = {"sampling": asked, "session_id": "s", "create_session": True}
        first = await stack.generate(prompt(0), **named)
        second = await stack.generate(prompt(1), **named)
    context = [*prompt(0), *first.token_ids, *prompt(1)]
    assert second.token_ids == truth(context, 20)
    assert second.result is not None
    assert second.result.usage.cached_tokens >= len(prompt(0))


async def test_a_stop_token_ends_it(redis_url: str) -> None:
    """Before what would have followed, though it was drafted and verified."""
    follows = truth(prompt(0), 10)
    asked = {**SAMPLED, "max_tokens": 24, "stop_token_ids": [follows[6]]}
    async with simulated(redis_url, "step_ms=0.2,survival=1") as stack:
        output = await stack.generate(prompt(0), sampling=asked, gamma=8)
    assert output.token_ids == follows[: follows.index(follows[6]) + 1]


async def test_room_is_as_large_as_it_is_told(redis_url: str) -> None:
    async with simulated(redis_url, kv_cache_tokens=4_096) as stack:
        info = await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest(), timeout=200)
    assert info.target.kv_capacity_tokens == info.draft.kv_capacity_tokens == 4_096
    assert (info.target.architecture, info.target.vocab_size) == ("simulated", VOCAB_SIZE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 2),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 1.5),
        ("logit_bias", {7: 1.0}),
        ("allowed_token_ids", [1, 2]),
        ("bad_words_token_ids", [{"ids": [1, 2]}]),
        ("prompt_logprobs", 0),
    ],
)
async def test_what_is_not_imitated_is_refused_by_name(
    field: str, value: Any, redis_url: str
) -> None:
    """Not answered wrongly; and the next call is served."""
    async with simulated(redis_url) as stack:
        asked = {**SAMPLED, "max_tokens": 4}
        refused = await refusal(stack.generate(prompt(0), sampling=asked | {field: value}))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert f"sampling.{field}: a simulated tier does not support it" in refused.message
        output = await stack.generate(prompt(0), sampling=asked)
        await eventually(lambda: nothing_held(stack))
    assert output.token_ids == truth(prompt(0), 4)
