"""NaN or infinite logits: the generation fails with a reason and a count; others are unaffected.

One token of the models has a NaN embedding: logits after it are NaN.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers

from outrider.runtime.protobuf import FLOAT32, UINT16, UINT32, pack
from outrider.v1 import draft_pb2, orchestrator_pb2, sampling_pb2, target_pb2
from tests.services.fake_draft import FakeDraft, faking
from tests.services.parts import (
    GREEDY,
    Greedy,
    Pair,
    System,
    Tiers,
    both_tiers,
    clients,
    orchestrating,
    refusal,
)
from tests.services.replicas import FAILING, READY, has_states
from tests.services.streams import ids, raw, row, sizes, target_open
from tests.stack import Output, Stack, request
from tests.telemetry.parts import scrape

BAD = 77
PROMPT = list(range(20, 60))
POISONED = [*PROMPT[:10], BAD, *PROMPT[10:]]
NUM_TOKENS = 24
NAMED = "the model's logits are NaN or infinite"
FAILURES = "outrider_failures_total"
# A draft that tries many tokens meets the bad one sooner or later.
NARROW = {"lookahead": 1, "fan_out": 1}
Frame = target_pb2.VerifyRequest


def poisoned(source: Path, directory: Path, value: float) -> Path:
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = value
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["nan", "inf"])
def value(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(scope="module")
def bad_pair(value: float, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("poisoned")
    return Pair(*(poisoned(model, root / model.name, value) for model in pair))


@contextlib.asynccontextmanager
async def stack(pair: Pair, redis_url: str, **settings: Any) -> AsyncIterator[tuple[Tiers, Stack]]:
    async with (
        both_tiers(pair, metrics_port=0) as tiers,
        orchestrating(tiers, redis_url, gamma=4, **{**NARROW, **settings}) as system,
    ):
        yield tiers, system


def verification(name: str) -> Any:
    return sampling_pb2.Verification.Value(f"VERIFICATION_{name.upper()}")


HOW: dict[str, dict[str, Any]] = {
    "plain": {"gamma": 0, "sampling": GREEDY},
    "greedy": {"sampling": GREEDY},
    "logprobs": {"sampling": {**GREEDY, "logprobs": 3}},
    **{
        name: {
            "sampling": {
                "temperature": 1.0,
                "seed": 5,
                "ignore_eos": True,
                # Else it is drawn now and then.
                "logit_bias": {BAD: -100.0},
            },
            "verification": verification(name),
        }
        for name in ("rejection", "block", "coupled")
    },
}


def asking(how: str, **sampling: Any) -> dict[str, Any]:
    fields = {**HOW[how]}
    fields["sampling"] = {**fields["sampling"], "max_tokens": NUM_TOKENS, **sampling}
    return fields


@pytest.mark.parametrize("how", HOW)
async def test_a_prompt_that_gives_nan_fails_by_name(
    how: str, bad_pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """It is counted; other generations in the same batch have the tokens that they have alone."""
    async with stack(bad_pair, redis_url) as (tiers, system):
        alone = [(await system.generate(PROMPT[n:], **asking(how))).token_ids for n in range(4)]
        refused, *others = await asyncio.gather(
            refusal(system.generate(POISONED, **asking(how))),
            *(system.generate(PROMPT[n:], **asking(how)) for n in range(4)),
        )
        failures = (await scrape(tiers.target)).by(FAILURES, "reason")
    assert refused.code is grpc.StatusCode.INTERNAL
    assert NAMED in refused.message
    assert failures["non_finite"] == 1
    assert failures["internal"] == 0
    if how not in ("rejection", "block"):  # those depend on what was drafted in time
        assert [output.token_ids for output in others] == alone
    if HOW[how]["sampling"] is GREEDY:
        assert others[0].token_ids == greedy(PROMPT, NUM_TOKENS)
    assert [len(output.token_ids) for output in others] == [NUM_TOKENS] * 4


@pytest.mark.parametrize("how", HOW)
async def test_an_output_that_turns_into_nan_ends_there(
    how: str, bad_pair: Pair, redis_url: str
) -> None:
    """The bad token is forced as the first one: it is sent, and nothing after it."""
    async with stack(bad_pair, redis_url, draft_endpoint=None) as (_, system):
        shown = Output()

        async def generate() -> None:
            forced = asking(how, logit_bias={BAD: 100.0})
            call = system.client.Generate(request(PROMPT, **forced), timeout=200)
            async for chunk in call:
                shown.add(chunk)

        refused = await refusal(generate())
    assert (refused.code, shown.token_ids) == (grpc.StatusCode.INTERNAL, [BAD])
    assert NAMED in refused.message


async def test_a_batch_with_good_and_bad_requests(bad_pair: Pair, greedy: Greedy) -> None:
    """In one pass: prompts, a verification with a bad draft token, and others near them in memory.

    Twice, so that the second ones use memory in which bad keys and values were.
    """
    async with (
        both_tiers(bad_pair, draft_kv=None, target_kv=512) as tiers,
        clients(tiers) as system,
        raw(system.target.Verify()) as stream,
    ):
        for first in (1, 101):
            numbers = range(first, first + 6)
            prompts = {n: POISONED if n % 2 else PROMPT for n in numbers}
            opens = [
                target_open(n, prompt_len=len(prompt), max_len=80) for n, prompt in prompts.items()
            ]
            rows = [row(n, 0, prompt) for n, prompt in prompts.items()]
            await stream.write(Frame(opens=opens, rows=rows))
            answers = {n: await stream.answer(n) for n in numbers}
            for n, prompt in prompts.items():
                if prompt is POISONED:
                    assert NAMED in answers[n].detail
                else:
                    assert answers[n].sample_ids == ids(greedy(PROMPT, 1))
            # The bad token among draft tokens: the row is answered without it and what follows.
            truth = greedy(PROMPT, 4)
            good = [n for n, prompt in prompts.items() if prompt is PROMPT]
            drafts = {n: [*truth[1:2], BAD, truth[3]] if n == good[0] else truth[1:4] for n in good}
            await stream.write(
                Frame(rows=[row(n, len(PROMPT), truth[:1], drafts[n]) for n in good])
            )
            cut, *others = [await stream.answer(n) for n in good]
            assert (cut.num_left_out, cut.sample_ids) == (2, ids(greedy(PROMPT, 3)[1:]))
            for other in others:
                assert other.num_left_out == 0
                assert other.sample_ids == ids(greedy(PROMPT, 5)[1:])
            await stream.write(Frame(closes=[{"generation_id": n} for n in numbers]))


@pytest.mark.parametrize("has_supports", [False, True])
async def test_a_bad_draft_token_at_every_position(
    has_supports: bool, bad_pair: Pair, greedy: Greedy
) -> None:
    """The positions up to the bad token are answered; the cached KV is right.

    With supports this includes the bad token's own position. No pass counts as failed.
    """
    truth = greedy(PROMPT, 200)
    supports: dict[str, Any] = {}
    async with (
        both_tiers(bad_pair, draft_kv=None) as tiers,
        clients(tiers) as system,
        raw(system.target.Verify()) as stream,
    ):
        await stream.write(
            Frame(
                opens=[target_open(1, prompt_len=len(PROMPT), max_len=400)],
                rows=[row(1, 0, PROMPT)],
            )
        )
        assert (await stream.answer(1)).sample_ids == ids(truth[:1])
        num_out = 1
        for gamma, place in [(1, 0), (2, 0), (2, 1), *((16, place) for place in range(16))]:
            drafts = truth[num_out : num_out + gamma]
            drafts[place] = BAD
            if has_supports:
                supports = {"support_sizes": sizes([1] * gamma), "support_ids": ids(drafts)}
            start = len(PROMPT) + num_out - 1
            await stream.write(
                Frame(rows=[row(1, start, truth[num_out - 1 : num_out], drafts, **supports)])
            )
            answer = await stream.answer(1)
            assert answer.num_left_out == gamma - place
            assert answer.sample_ids[4 * place :] == ids([truth[num_out + place]])
            if has_supports:
                assert answer.support_probs == pack([1.0] * place + [0.0], FLOAT32)
                assert answer.tail_mass == pack([0.0] * place + [1.0], FLOAT32)
            else:
                assert answer.sample_ids == ids(truth[num_out : num_out + place + 1])
            num_out += place + 1
        assert FAILING not in stream.states


async def test_repeated_failures_take_the_replica_out_of_service(
    bad_pair: Pair, greedy: Greedy
) -> None:
    """Its self-test uses other tokens and takes it back into service."""
    async with (
        both_tiers(bad_pair, draft_kv=None) as tiers,
        clients(tiers) as system,
        raw(system.target.Verify()) as stream,
    ):
        for n in (1, 2, 3):
            opening = target_open(n, prompt_len=len(POISONED))
            await stream.write(Frame(opens=[opening], rows=[row(n, 0, POISONED)]))
            assert NAMED in (await stream.answer(n)).detail
        await has_states(stream, READY, FAILING, READY)
        opening = target_open(4, prompt_len=len(PROMPT))
        await stream.write(Frame(opens=[opening], rows=[row(4, 0, PROMPT)]))
        assert (await stream.answer(4)).sample_ids == ids(greedy(PROMPT, 1))


async def test_the_prefix_of_a_bad_prompt_is_not_reused(bad_pair: Pair, greedy: Greedy) -> None:
    """The prefix cache has nothing of a failed generation."""
    long = [*PROMPT, *POISONED]
    async with (
        both_tiers(bad_pair, draft_kv=None, max_step_tokens=16) as tiers,
        clients(tiers) as system,
        raw(system.target.Verify()) as stream,
    ):
        await stream.write(
            Frame(opens=[target_open(1, prompt_len=len(long), max_len=200)], rows=[row(1, 0, long)])
        )
        assert NAMED in (await stream.answer(1)).detail
        await stream.write(
            Frame(
                opens=[target_open(2, prompt_len=len(PROMPT) + 5, max_len=200)],
                rows=[row(2, 0, long[: len(PROMPT) + 5])],
            )
        )
        answer = await stream.answer(2)
        assert answer.num_reused_tokens == 0
        assert answer.sample_ids == ids(greedy(long[: len(PROMPT) + 5], 1))


@contextlib.asynccontextmanager
async def bad_draft(pair: Pair, redis_url: str, prob: float | None) -> AsyncIterator[System]:
    """A draft that proposes the bad token in every round, with probability `prob` if sampled."""

    def propose(asked: Any) -> list[draft_pb2.Proposal]:
        if not isinstance(asked, draft_pb2.DraftCommit):
            return []
        support = {
            "support_sizes": pack([2], UINT16),
            "support_ids": pack([BAD, 3], UINT32),
            "support_probs": pack([prob or 0.0, 1 - (prob or 0.0)], FLOAT32),
        }
        return [
            draft_pb2.Proposal(
                generation_id=asked.generation_id,
                base_len=asked.committed_len,
                token_ids=pack([BAD], UINT32),
                **(support if prob is not None else {}),
            )
        ]

    async with both_tiers(pair, draft_kv=None) as tiers, clients(tiers) as target:
        asked = target_pb2.TargetServiceGetModelInfoRequest()
        model = (await target.target.GetModelInfo(asked)).model
        async with (
            faking(FakeDraft(model, propose)) as endpoint,
            orchestrating(tiers, redis_url, draft_endpoint=endpoint, gamma=1) as system,
        ):
            yield system


@pytest.mark.parametrize("how", ["rejection", "block"])
async def test_an_accepted_draft_token_that_gives_nan_ends_the_output(
    how: str, bad_pair: Pair, redis_url: str
) -> None:
    """As if the target had sampled it: it is the last token sent."""
    shown = [Output() for _ in range(8)]
    async with bad_draft(bad_pair, redis_url, 1e-6) as system:

        async def generate(seed: int) -> None:
            fields = asking(how, seed=seed, logit_bias={BAD: 3.0}, max_tokens=200)
            async for chunk in system.client.Generate(request(PROMPT, **fields), timeout=200):
                shown[seed].add(chunk)

        for seed, output in enumerate(shown):
            refused = await refusal(generate(seed))
            assert refused.code is grpc.StatusCode.INTERNAL
            assert NAMED in refused.message
            assert output.token_ids.index(BAD) == len(output.token_ids) - 1
    assert orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED in {output.origins[-1] for output in shown}


@pytest.mark.parametrize("how", ["greedy", "rejection", "block", "coupled"])
async def test_a_bad_draft_token_costs_no_answer(
    how: str, bad_pair: Pair, redis_url: str, greedy: Greedy
) -> None:
    """The draft proposes a token that the target cannot run and would reject."""
    has_supports = how in ("rejection", "block")
    async with bad_draft(bad_pair, redis_url, 0.9 if has_supports else None) as system:
        plain = await system.generate(PROMPT, **{**asking(how), "gamma": 0})
        drafted = await system.generate(PROMPT, **asking(how))
    assert drafted.speculation.num_rounds == len(drafted.token_ids) == NUM_TOKENS
    if not has_supports:
        assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize("how", ["greedy", "rejection", "block", "coupled"])
async def test_a_draft_with_nan_logits_costs_speed_only(
    how: str, pair: Pair, bad_pair: Pair, redis_url: str
) -> None:
    """The prompt contains a token that only the draft cannot run."""
    mixed = Pair(pair.target, bad_pair.draft)
    async with stack(mixed, redis_url) as (_, system):
        plain = await system.generate(POISONED, **{**asking(how), "gamma": 0})
        drafted = await system.generate(POISONED, **asking(how))
        other = await system.generate(PROMPT, **asking(how))
    assert len(drafted.token_ids) == NUM_TOKENS
    assert drafted.speculation.num_draft_tokens == 0
    assert other.speculation.num_draft_tokens > 0
    if how in ("greedy", "coupled"):
        assert drafted.token_ids == plain.token_ids
