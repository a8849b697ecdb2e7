"""Pool of past outputs: whose are found, and that its memory is bounded."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from orchestrator.speculation.lookup import PromptLookup
from orchestrator.speculation.output_pool import SEGMENT_TOKENS, OutputPool

OUTPUT = [5, 6, 7, 8, 9]


def looked_up(pool: OutputPool, client: str, context: list[int], num_tokens: int) -> list[int]:
    lookup = PromptLookup(context, len(context), others=pool.indexes(client))
    lookup.update()
    return list(lookup.propose(num_tokens))


def test_a_past_output_of_the_client_is_continued() -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", OUTPUT)
    assert looked_up(pool, "ada", [1, 5, 6], 2) == [7, 8]


@pytest.mark.parametrize("other", ["bob", ""])
def test_an_output_of_another_client_is_never_found(other: str) -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", OUTPUT)
    assert looked_up(pool, other, [1, 5, 6], 2) == []


def test_clients_stay_apart_whatever_is_added_and_dropped() -> None:
    """Each client's outputs have tokens of its own, in a pool that overflows all the time."""
    pool, rng = OutputPool(3 * SEGMENT_TOKENS), random.Random(0)
    for _ in range(200):
        client = rng.randrange(5)
        pool.add(f"client{client}", [10 * client + rng.randrange(2) for _ in range(3000)])
        for name in range(5):
            texts = [set(index.text) - {-1} for index in pool.indexes(f"client{name}")]
            assert all(token // 10 == name for text in texts for token in text)


def test_a_proposal_ends_with_its_output() -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", OUTPUT)
    pool.add("ada", [1, 2, 3])
    assert looked_up(pool, "ada", [5, 6], 9) == [7, 8, 9]
    assert looked_up(pool, "ada", [8, 9], 9) == []
    assert looked_up(pool, "ada", [2, 3], 9) == []


def test_the_longer_match_wins_and_of_equals_the_context_s_own() -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", OUTPUT)
    assert looked_up(pool, "ada", [6, 7, 1, 5, 6, 7], 1) == [8]
    assert looked_up(pool, "ada", [6, 7, 1, 6, 7], 1) == [1]


def test_memory_is_bounded() -> None:
    """Whatever is added by however many clients; 16 bytes a token of the bound, and some slack."""
    max_tokens, rng = 8 * SEGMENT_TOKENS, random.Random(0)
    outputs = [[rng.randrange(50_000) for _ in range(1000)] for _ in range(20)]
    pool = OutputPool(max_tokens)
    tracemalloc.start()
    try:
        for number in range(600):
            pool.add(f"client{number % 7}", outputs[number % 20])
            assert pool.num_tokens <= max_tokens
        num_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert pool.num_tokens > max_tokens / 4
    assert num_bytes < 20 * max_tokens


def test_a_dropped_segment_is_emptied_under_a_generation_that_uses_it() -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", OUTPUT)
    context = [1, 5, 6]
    lookup = PromptLookup(context, 100, others=pool.indexes("ada"))
    lookup.update()
    assert lookup.propose(1) == (7,)
    for _ in range(3):
        pool.add("bob", [2] * 8000)
    assert pool.indexes("ada") == []
    assert lookup.propose(1) == ()
    context += [7, 5, 6]
    lookup.update()
    assert lookup.propose(1) == (7,), "its own text now has it"


def test_a_long_output_is_cut() -> None:
    pool = OutputPool(SEGMENT_TOKENS)
    pool.add("ada", [3] * 100_000)
    assert pool.num_tokens < SEGMENT_TOKENS
