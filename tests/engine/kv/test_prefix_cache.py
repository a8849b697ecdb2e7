"""Prefix cache: pages are found by their tokens, shared, copied, evicted, and stay correct."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.engine import Append, Engine, KVStore, Sequence
from outrider.engine.kv.store import PAGE_SIZE
from outrider.errors import KVFull
from tests.engine.kv.test_store import append, contents, make_store
from tests.engine.reference import Reference, Shadow

HELLO = list(range(1, 41))


def kv_of(token_ids: list[int]) -> list[int]:
    """Stand-in for the keys and values of these tokens: each depends on all tokens before it."""
    values, mark = [], 0
    for token_id in token_ids:
        mark = (mark * 1_000_003 + token_id + 1) % (2**61 - 1)
        values.append(mark)
    return values


def run(store: KVStore, sequence: Sequence, token_ids: list[int]) -> None:
    """Append tokens as a forward pass does: the sequence then holds all of `token_ids`."""
    append(store, sequence, kv_of(token_ids)[sequence.length :])


def cached_sequence(store: KVStore, token_ids: list[int], max_len: int | None = None) -> Sequence:
    """An open sequence with these tokens, which are in the prefix cache."""
    sequence = store.open(max_len or len(token_ids))
    run(store, sequence, token_ids)
    store.cache_prefix(sequence, token_ids)
    return sequence


def num_reused(store: KVStore, token_ids: list[int]) -> int:
    """Number of these tokens that a new sequence would re-use."""
    sequence = store.open(len(token_ids))
    num_found = store.reuse_prefix(sequence, token_ids)
    assert contents(store, sequence) == kv_of(token_ids)[:num_found]
    store.check_integrity()
    store.free(sequence)
    return num_found


def allocate_beyond_free(store: KVStore, num_pages: int) -> None:
    """Allocate `num_pages` more pages than are free, one by one, and free them again."""
    num_free = (store.capacity_tokens - store.used_tokens - store.idle_tokens) // PAGE_SIZE
    taken = [store.open(1) for _ in range(num_free + num_pages)]
    for sequence in taken:
        store.free(sequence)


def test_a_cached_prefix_is_found_in_full_pages() -> None:
    store = make_store(16)
    store.free(cached_sequence(store, HELLO))
    assert (store.used_tokens, store.idle_tokens) == (0, 32)
    assert num_reused(store, HELLO) == 32
    assert num_reused(store, [*HELLO, 99]) == 32
    assert num_reused(store, HELLO[:32]) == 32
    assert num_reused(store, HELLO[:31]) == 16
    assert num_reused(store, HELLO[:15]) == 0
    assert num_reused(store, [*HELLO[:20], 99, *HELLO[21:]]) == 16
    assert num_reused(store, [99, *HELLO[1:]]) == 0


def test_a_page_is_identified_by_all_tokens_before_it() -> None:
    """Not only by its own tokens."""
    store = make_store(16)
    page, other = [1] * PAGE_SIZE, [2] * PAGE_SIZE
    store.free(cached_sequence(store, page + other))
    store.free(cached_sequence(store, other + page))
    assert num_reused(store, page + page) == 16
    assert num_reused(store, page + other) == 32
    assert num_reused(store, other + page) == 32
    assert num_reused(store, other + other) == 16


def test_only_cached_tokens_are_found() -> None:
    store = make_store(16)
    sequence = store.open(len(HELLO))
    run(store, sequence, HELLO)
    assert num_reused(store, HELLO) == 0
    store.cache_prefix(sequence, HELLO[:17])
    assert num_reused(store, HELLO) == 16
    store.free(sequence)
    assert (num_reused(store, HELLO), store.idle_tokens) == (16, 16)


def test_a_long_prefix_is_shared() -> None:
    """Memory holds it once; the tokens after it are separate."""
    store = make_store(64)
    prompt = list(range(160))
    first = cached_sequence(store, prompt, 192)
    second = store.open(192)
    assert store.reuse_prefix(second, prompt) == 160
    assert store.used_tokens == 160 + 32 + 32
    assert first.first_row == second.first_row
    run(store, first, [*prompt, *range(500, 520)])
    run(store, second, [*prompt, *range(600, 630)])
    store.free(first)
    assert contents(store, second) == kv_of([*prompt, *range(600, 630)])
    store.check_integrity()


def test_a_short_prefix_is_copied_while_memory_is_free() -> None:
    """So the whole sequence is one run of pages, which attention reads in place."""
    store = make_store(64)
    first = cached_sequence(store, HELLO, 128)
    second = store.open(128)
    assert store.reuse_prefix(second, HELLO) == 32
    assert second.run_start is not None
    assert second.first_row != first.first_row
    assert contents(store, second) == kv_of(HELLO)[:32]


def test_any_prefix_is_shared_when_memory_is_scarce() -> None:
    store = make_store(16)
    first, second = cached_sequence(store, HELLO, 112), store.open(112)
    assert store.reuse_prefix(second, HELLO) == 32
    assert store.used_tokens == 112 + 112 - 32
    assert first.first_row == second.first_row
    third = store.open(64)
    assert store.reuse_prefix(third, HELLO) == 32
    assert contents(store, third) == contents(store, second) == kv_of(HELLO)[:32]
    store.check_integrity()


def test_reuse_extends_the_tokens_of_a_sequence() -> None:
    """From the middle of a page that is full only in the cache."""
    store = make_store(32)
    store.free(cached_sequence(store, HELLO))
    for max_len in (48, 200):
        sequence = store.open(max_len)
        run(store, sequence, HELLO[:21])
        assert store.reuse_prefix(sequence, HELLO) == 11
        assert store.reuse_prefix(sequence, HELLO) == 0
        assert contents(store, sequence) == kv_of(HELLO)[:32]
        store.check_integrity()
        store.free(sequence)


def test_equal_tokens_of_two_sequences_are_cached_once() -> None:
    store = make_store(16)
    first, second = cached_sequence(store, HELLO), cached_sequence(store, [*HELLO, *range(70, 80)])
    store.check_integrity()
    store.free(first)
    assert (store.used_tokens, store.idle_tokens) == (64, 32)
    store.free(second)
    assert store.idle_tokens == 48, "only the second sequence has a third page"
    assert num_reused(store, [*HELLO, *range(70, 80)]) == 48


def test_idle_pages_are_evicted_on_demand() -> None:
    store = make_store(8)
    for start in (0, 100):
        store.free(cached_sequence(store, list(range(start, start + 64))))
    assert (store.used_tokens, store.idle_tokens) == (0, 128)
    owner = store.open(128)
    assert (store.used_tokens, store.idle_tokens) == (128, 0)
    with pytest.raises(KVFull, match="1 KV pages needed, 0 of 8 are free"):
        store.open(1)
    store.free(owner)
    assert num_reused(store, list(range(64))) == 0


def test_eviction_is_least_recently_used_first_and_from_the_end() -> None:
    store = make_store(16)
    texts = [list(range(start, start + 64)) for start in (0, 100, 200)]
    for text in texts:
        store.free(cached_sequence(store, text))
    assert num_reused(store, texts[0]) == 64
    allocate_beyond_free(store, 2)
    assert [num_reused(store, text) for text in texts] == [64, 32, 64]
    # They were looked up in this order, so the first is the least recently used.
    allocate_beyond_free(store, 3)
    assert [num_reused(store, text) for text in texts] == [16, 32, 64]


def test_a_touched_prefix_is_evicted_last() -> None:
    """A request does not evict the prefix it is about to re-use."""
    store = make_store(8)
    texts = [list(range(start, start + 64)) for start in (0, 100)]
    for text in texts:
        store.free(cached_sequence(store, text))
    store.touch_prefix(texts[0])
    sequence = store.open(64)
    assert store.reuse_prefix(sequence, texts[0]) == 64
    assert contents(store, sequence) == kv_of(texts[0])


def test_a_refused_request_evicts_nothing() -> None:
    store = make_store(8)
    store.free(cached_sequence(store, list(range(64))))
    owner = store.open(48)
    with pytest.raises(KVFull, match="6 KV pages needed"):
        store.open(96)
    store.free(owner)
    assert num_reused(store, list(range(64))) == 64


def test_pages_in_use_are_not_evicted() -> None:
    store = make_store(8)
    owner = cached_sequence(store, HELLO)
    for start in (100, 200, 300):
        store.free(cached_sequence(store, list(range(start, start + 80))))
    assert contents(store, owner) == kv_of(HELLO)
    assert num_reused(store, HELLO) == 32


def test_eviction_frees_consecutive_pages() -> None:
    """Otherwise all sequences would be scattered once the memory had been full."""
    store = make_store(64)
    for start in range(0, 1600, 100):
        store.free(cached_sequence(store, list(range(start, start + 64))))
    assert store.idle_tokens == store.capacity_tokens
    for size in (64, 100, 256, 33, 200):
        assert store.open(size).run_start is not None, f"{size} tokens are scattered"


def test_rewriting_a_cached_page_removes_it_from_the_cache() -> None:
    """With no page free: no other sequence uses it, so it is written in place."""
    store = make_store(3)
    sequence = cached_sequence(store, HELLO)
    store.truncate(sequence, 20)
    assert contents(store, sequence) == kv_of(HELLO)[:20]
    store.check_integrity()
    run(store, sequence, [*HELLO[:20], *range(900, 920)])
    store.free(sequence)
    assert num_reused(store, HELLO[:17]) == 16


def test_rewriting_a_page_that_others_use_copies_it() -> None:
    store = make_store(32)
    prompt = list(range(160))
    store.free(cached_sequence(store, prompt))
    first, second = store.open(176), store.open(176)
    assert store.reuse_prefix(first, prompt) == store.reuse_prefix(second, prompt) == 160
    store.truncate(first, 100)
    run(store, first, [*prompt[:100], *range(900, 950)])
    assert contents(store, second) == kv_of(prompt)
    assert contents(store, first) == kv_of([*prompt[:100], *range(900, 950)])
    store.check_integrity()
    store.free(first)
    store.free(second)
    assert num_reused(store, prompt) == 160


def test_moving_a_sequence_keeps_its_cached_pages() -> None:
    store = make_store(16)
    sequence = cached_sequence(store, HELLO)
    store.open(16)
    store.extend(sequence, 100)
    assert sequence.run_start is not None, "not moved although no other sequence uses it"
    assert contents(store, sequence) == kv_of(HELLO)
    assert num_reused(store, HELLO) == 32
    store.check_integrity()


def test_forks_of_a_reused_prefix() -> None:
    store = make_store(32)
    prompt = list(range(160))
    store.free(cached_sequence(store, prompt))
    parent = store.open(192)
    store.reuse_prefix(parent, prompt)
    run(store, parent, [*prompt, 7, 7])
    child = store.fork(parent, 180, length=161)
    run(store, child, [*prompt, 7, 8, 9])
    store.cache_prefix(child, [*prompt, 7, 8, 9])
    store.free(parent)
    assert contents(store, child) == kv_of([*prompt, 7, 8, 9])
    store.check_integrity()


def test_integrity_check_finds_a_cached_page_that_may_be_written() -> None:
    store = make_store(8)
    sequence = cached_sequence(store, HELLO)
    sequence.length = 20
    with pytest.raises(AssertionError, match="may write page"):
        store.check_integrity()


FAMILIES = ("llama", "mistral_window", "gemma3", "gpt2")


@pytest.mark.parametrize("max_len", [160, 400], ids=["shared", "copied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_reused_prefix_are_the_same(
    family: str,
    max_len: int,
    engine_of: Callable[..., Engine],
    model_dir: Callable[[str], Path],
) -> None:
    """They equal those of a model that computed the whole prompt."""
    engine, shadow = engine_of(family), Shadow(Reference(model_dir(family)), 3)
    store, prompt = engine.store, shadow.random_tokens(150)
    first = store.open(160)
    engine.forward([Append(first, prompt, 1)])
    store.cache_prefix(first, prompt)
    sequence = store.open(max_len)
    assert store.reuse_prefix(sequence, prompt) == 144
    is_shared = sequence.first_row == first.first_row
    assert is_shared == (max_len == 160)
    for rest in (prompt[144:], *([token_id] for token_id in shadow.random_tokens(3))):
        prompt = prompt[: sequence.length] + rest
        logits = engine.forward([Append(sequence, rest, len(rest))])
        shadow.assert_rows(logits, prompt, "after a re-used prefix")
    for owner in (first, sequence):
        store.free(owner)
    store.check_integrity()


def test_sequences_with_a_shared_prefix_are_attended_together(
    engine_of: Callable[..., Engine], model_dir: Callable[[str], Path]
) -> None:
    """In one pass, one token and several at a time."""
    engine, shadow = engine_of("llama"), Shadow(Reference(model_dir("llama")), 4)
    store, prompt = engine.store, shadow.random_tokens(128)
    first = store.open(140)
    engine.forward([Append(first, prompt, 0)])
    store.cache_prefix(first, prompt)
    sequences, texts = [first], [list(prompt)]
    for _ in range(4):
        sequences.append(store.open(140))
        texts.append(list(prompt))
        assert store.reuse_prefix(sequences[-1], prompt) == 128
    assert store.used_tokens == 144 + 4 * 16
    for count in (1, 4, 1):
        new = [shadow.random_tokens(count) for _ in sequences]
        appends = [Append(s, ids, count) for s, ids in zip(sequences, new, strict=True)]
        rows = torch.split(engine.forward(appends), count)
        for text, ids, logits in zip(texts, new, rows, strict=True):
            text += ids
            shadow.assert_rows(logits, text, f"{count} at a time")
    for sequence in sequences:
        store.free(sequence)
    store.check_integrity()


def test_token_ids_may_be_of_any_integer_type() -> None:
    store = make_store(8)
    store.free(cached_sequence(store, HELLO))
    for kind in (np.int64, np.uint32, np.int32):
        sequence = store.open(40)
        assert store.reuse_prefix(sequence, np.array(HELLO, kind)) == 32
        store.free(sequence)
