"""Log-probabilities of the prompt are the model's own, however the prompt runs."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from scipy.special import log_softmax

from orchestrator.generation.validation import MAX_PROMPT_LOGPROBS
from outrider.v1 import orchestrator_pb2 as pb
from tests.e2e.pairs import TinyPair
from tests.e2e.reference import Reference
from tests.e2e.traffic import COUPLED, REJECTION, prompt_of
from tests.services.parts import refusal
from tests.stack import Output, Stack, request, running_stack

pytestmark = pytest.mark.slow

_TOLERANCE = 1e-4
GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8}


async def scored(
    stack: Stack, prompt: list[int], num_top: int, sampling: dict[str, Any], **fields: Any
) -> tuple[Output, pb.PromptLogprobs]:
    """The output, and the prompt's log-probabilities, which only the first message has."""
    output, found = Output(), []
    made = request(prompt, sampling | {"prompt_logprobs": num_top}, **fields)
    async for chunk in stack.client.Generate(made, timeout=200):
        found.append(chunk.prompt_logprobs if chunk.HasField("prompt_logprobs") else None)
        output.add(chunk)
    assert found[0] is not None
    assert found[1:] == [None] * (len(found) - 1)
    return output, found[0]


def assert_are_the_models(
    reference: Reference, prompt: list[int], num_top: int, given: pb.PromptLogprobs
) -> None:
    rows = log_softmax(reference.logits(prompt), axis=-1)[:-1]
    num = len(prompt) - 1
    assert (list(given.token_ids), given.num_top) == (prompt, num_top)
    np.testing.assert_allclose(given.logprobs, rows[np.arange(num), prompt[1:]], atol=_TOLERANCE)
    top_ids = np.array(given.top_ids, np.int64).reshape(num, num_top)
    top = np.array(given.top_logprobs).reshape(num, num_top)
    ranks = 1 + (rows > rows[np.arange(num), prompt[1:]][:, None]).sum(-1)
    # Logits that are equal but for rounding may rank either way.
    np.testing.assert_allclose(given.ranks, ranks, atol=1)
    best = np.sort(rows, axis=-1)[:, ::-1][:, :num_top]
    np.testing.assert_allclose(top, best, atol=_TOLERANCE)
    np.testing.assert_allclose(np.take_along_axis(rows, top_ids, -1), best, atol=_TOLERANCE)


async def test_they_are_those_of_the_model(tiny_pair: TinyPair, redis: str) -> None:
    """Prompts of one token, of a few and of several chunks; cached, and beside other generations.

    The output is the same as without them.
    """
    reference, settings = tiny_pair.reference, {"max_step_tokens": 96}
    async with running_stack(
        tiny_pair.target, tiny_pair.draft, redis, target_settings=settings
    ) as stack:
        for length in (1, 2, 9, 97, 400, 400):
            prompt = prompt_of(length, vocab_size=256)
            for num_top, gamma in ((0, 0), (3, 4)):
                output, given = await scored(stack, prompt, num_top, GREEDY, gamma=gamma)
                assert_are_the_models(reference, prompt, num_top, given)
                assert output.token_ids == reference.greedy(prompt, 8)
                assert output.result is not None
                assert output.result.usage.cached_tokens == 0
        plain = await stack.generate(prompt, sampling=GREEDY)
        assert plain.result is not None
        assert plain.result.usage.cached_tokens > 300  # of the prompt that was scored
        # Processors change neither them nor what they are of.
        sampling = {"seed": 3, "max_tokens": 8, "top_k": 2, "logit_bias": {5: 9.0}, "logprobs": 1}
        for verification in (COUPLED, REJECTION):
            output, given = await scored(
                stack, prompt[:50], 1, sampling, verification=verification, gamma=3
            )
            assert_are_the_models(reference, prompt[:50], 1, given)
            assert len(output.logprobs) == 8


async def test_in_a_session_they_are_of_the_whole_context(tiny_pair: TinyPair, redis: str) -> None:
    """Its KV is not used for that. A resumption does not repeat them, nor can it make them up."""
    async with running_stack(tiny_pair.target, tiny_pair.draft, redis) as stack:
        first = await stack.generate(
            [1, 2, 3], sampling=GREEDY, session_id="prompt-logprobs", create_session=True
        )
        context = [1, 2, 3, *first.token_ids, 7, 8]
        _, given = await scored(stack, [7, 8], 2, GREEDY, session_id="prompt-logprobs")
        assert_are_the_models(tiny_pair.reference, context, 2, given)
        resumed = pb.GenerateRequest(session_id="prompt-logprobs", resume_from=3)
        chunks = [chunk async for chunk in stack.client.Generate(resumed, timeout=200)]
        assert not any(chunk.HasField("prompt_logprobs") for chunk in chunks)
        from_start = pb.GenerateRequest(session_id="prompt-logprobs", resume_from=0)
        refused = await refusal(anext(aiter(stack.client.Generate(from_start, timeout=200))))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "log-probabilities of the prompt" in refused.message


async def test_too_many_are_refused_by_name(redis: str) -> None:
    """Also where the tier is simulated and has no log-probabilities."""
    async with running_stack(
        None, None, redis, target_settings={"simulate": "context_len=70000"}
    ) as stack:
        for prompt, num_top, why in (
            ([1] * (MAX_PROMPT_LOGPROBS // 6 + 1), 5, "at most 10922 tokens"),
            ([1, 2], 21, "is not in 0 to 20"),
            ([1, 2], 0, "a simulated tier does not support it"),
        ):
            made = request(prompt, {"max_tokens": 2, "prompt_logprobs": num_top})
            refused = await refusal(anext(aiter(stack.client.Generate(made, timeout=200))))
            assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
            assert "sampling.prompt_logprobs" in refused.message
            assert why in refused.message
