"""Log-probabilities are the model's own, of exactly the emitted tokens, however they came about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from outrider.v1 import orchestrator_pb2
from tests.e2e.pairs import SpreadPair, TinyPair
from tests.e2e.reference import Reference, Sampling
from tests.e2e.traffic import (
    BLOCK,
    COUPLED,
    REJECTION,
    assert_speculated,
    generate_all,
    prompt_of,
)
from tests.stack import Output, running_stack

pytestmark = pytest.mark.slow

_TOLERANCE = 1e-4
_NUM_TOKENS = 24
_PROMPTS = [prompt_of(length, vocab_size=8) for length in (1, 5, 30)]

# Log-probabilities are from the raw logits: no processor changes them.
_SAMPLINGS: list[Sampling] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {3: 2.0}},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_p": 0.8, "frequency_penalty": 0.3},
]


def _call(sampling: Sampling, num_logprobs: int, i: int, **fields: Any) -> dict[str, Any]:
    given = {"seed": i, "ignore_eos": True, "logprobs": num_logprobs, **sampling}
    return {"prompt": _PROMPTS[i], "sampling": {**given, "max_tokens": _NUM_TOKENS}, **fields}


def _assert_are_the_models(reference: Reference, prompt: list[int], output: Output) -> None:
    """Every token's, and the likeliest ones, best first."""
    assert len(output.logprobs) == len(output.token_ids) == _NUM_TOKENS
    rows = log_softmax(reference.output_logits(prompt, output.token_ids), axis=-1)
    for row, token_id, given in zip(rows, output.token_ids, output.logprobs, strict=True):
        assert given.logprob == pytest.approx(row[token_id], abs=_TOLERANCE)
        assert list(given.top_logprobs) == sorted(given.top_logprobs, reverse=True)
        best = np.sort(row)[::-1][: len(given.top_ids)]
        np.testing.assert_allclose(given.top_logprobs, best, atol=_TOLERANCE)
        np.testing.assert_allclose(row[list(given.top_ids)], best, atol=_TOLERANCE)
        assert len(set(given.top_ids)) == len(given.top_ids)


@pytest.mark.parametrize("num_logprobs", [0, 3])
@pytest.mark.parametrize("pair_name", ["tiny_pair", "spread_pair"])
async def test_with_speculation_as_without(
    num_logprobs: int, pair_name: str, redis: str, request: pytest.FixtureRequest
) -> None:
    """Greedy and coupled, whose tokens are the same: so must the log-probabilities be."""
    pair: TinyPair | SpreadPair = request.getfixturevalue(pair_name)
    calls = [
        _call(sampling, num_logprobs, i, verification=COUPLED, gamma=gamma)
        for sampling in _SAMPLINGS
        for i in range(len(_PROMPTS))
        for gamma in (0, 4)
    ]
    async with running_stack(pair.target, pair.draft, redis) as stack:
        outputs = await generate_all(stack, calls)
    for call, plain, speculated in zip(calls[::2], outputs[::2], outputs[1::2], strict=True):
        assert speculated.token_ids == plain.token_ids
        for one, other in zip(plain.logprobs, speculated.logprobs, strict=True):
            _assert_near(one, other)
            assert len(one.top_ids) == num_logprobs
        _assert_are_the_models(pair.reference, call["prompt"], speculated)
        _assert_are_the_models(pair.reference, call["prompt"], plain)
    assert_speculated(outputs[1::2])


def _assert_near(
    one: orchestrator_pb2.TokenLogprobs, other: orchestrator_pb2.TokenLogprobs
) -> None:
    assert one.logprob == pytest.approx(other.logprob, abs=_TOLERANCE)
    assert list(one.top_ids) == list(other.top_ids)
    np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=_TOLERANCE)


@pytest.mark.parametrize("verification", [REJECTION, BLOCK], ids=["rejection", "block"])
@pytest.mark.parametrize("num_logprobs", [0, 3, 20])
@pytest.mark.parametrize("pair_name", ["tiny_pair", "spread_pair"])
async def test_of_accepted_recovered_bonus_and_plain_tokens(
    verification: int,
    num_logprobs: int,
    pair_name: str,
    redis: str,
    request: pytest.FixtureRequest,
) -> None:
    """On the draft's support and outside it; more likeliest ones than there are tokens, too."""
    pair: TinyPair | SpreadPair = request.getfixturevalue(pair_name)
    calls = [
        _call(sampling, num_logprobs, i, verification=verification, gamma=3)
        for sampling in _SAMPLINGS
        for i in range(len(_PROMPTS))
    ]
    async with running_stack(pair.target, pair.draft, redis) as stack:
        outputs = await generate_all(stack, calls)
    vocab_size = pair.reference.model.config.vocab_size
    for call, output in zip(calls, outputs, strict=True):
        _assert_are_the_models(pair.reference, call["prompt"], output)
        assert all(len(t.top_ids) == min(num_logprobs, vocab_size) for t in output.logprobs)
    assert_speculated(outputs)
    assert len({origin for output in outputs for origin in output.origins}) == 4


async def test_none_unless_asked_for(tiny_pair: TinyPair, redis: str) -> None:
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis) as stack:
        output = await stack.generate([1, 2], sampling={"max_tokens": 5})
    assert output.logprobs == []
