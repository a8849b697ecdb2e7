"""The pair that ships: greedy output is transformers' own, alone and among 15 others."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.quickstart_pair import DRAFT_PATH, TARGET_PATH
from outrider.tokenizer import Tokenizer
from tests.e2e.reference import Reference, assert_greedy
from tests.e2e.traffic import assert_speculated, generate_all
from tests.stack import running_stack

pytestmark = pytest.mark.slow

_NUM_TOKENS = 32
_TEXT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()
'''


def _call(prompt: list[int], gamma: int) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_tokens": _NUM_TOKENS}
    return {"prompt": prompt, "sampling": sampling, "gamma": gamma}


async def test_greedy_output_of_the_shipped_pair(redis: str) -> None:
    """16 sessions of ragged lengths with every γ, then one alone with each."""
    tokenizer = Tokenizer.load(str(TARGET_PATH))
    assert tokenizer is not None
    token_ids = tokenizer.encode(_TEXT)
    prompts = [token_ids[: 1 + (len(token_ids) - 1) * i // 15] for i in range(16)]
    reference = Reference(TARGET_PATH)
    gammas = (0, 1, 3, 5, 8)
    async with running_stack(TARGET_PATH, DRAFT_PATH, redis, tokenizer=str(TARGET_PATH)) as stack:
        calls = [_call(prompt, gammas[i % len(gammas)]) for i, prompt in enumerate(prompts)]
        outputs = await generate_all(stack, calls)
        alone = [await stack.generate(**_call(prompts[7], gamma)) for gamma in gammas]
    for prompt, output in zip(
        [*prompts, *[prompts[7]] * len(gammas)], outputs + alone, strict=True
    ):
        expected = reference.greedy(prompt, _NUM_TOKENS)
        assert_greedy(reference, prompt, expected, output.token_ids)
    assert_speculated(outputs)
