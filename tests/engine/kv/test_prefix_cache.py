"""Keys and values made once: found by their tokens, shared, copied, evicted, and right."""

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


def marks(token_ids: list[int]) -> list[int]:
    """What stands for the keys and values of these tokens: of each with all that were before it."""
    made, mark = [], 0
    for token_id in token_ids:
        mark = (mark * 1_000_003 + token_id + 1) % (2**61 - 1)
        made.append(mark)
    return made


def run(store: KVStore, sequence: Sequence, token_ids: list[int]) -> None:
    """As a pass does: the sequence holds all of these tokens afterwards."""
    append(store, sequence, marks(token_ids)[sequence.length :])


def said(store: KVStore, token_ids: list[int], max_len: int | None = None) -> Sequence:
    """A sequence that has run these tokens, and others may begin with."""
    sequence = store.open(max_len or len(token_ids))
    run(store, sequence, token_ids)
    store.cache_prefix(sequence, token_ids)
    return sequence


def found(store: KVStore, token_ids: list[int]) -> int:
    """How many of the tokens a new sequence would begin with."""
    sequence = store.open(len(token_ids))
    num_found = store.reuse_prefix(sequence, token_ids)
    assert contents(store, sequence) == marks(token_ids)[:num_found]
    store.check_integrity()
    store.free(sequence)
    return num_found


def press(store: KVStore, num_pages: int) -> None:
    """Wants so many pages more than are free, one by one."""
    num_free = (store.capacity_tokens - store.used_tokens - store.idle_tokens) // PAGE_SIZE
    taken = [store.open(1) for _ in range(num_free + num_pages)]
    for sequence in taken:
        store.free(sequence)


def test_what_was_said_before_is_found_by_full_pages() -> None:
    store = make_store(16)
    store.free(said(store, HELLO))
    assert (store.used_tokens, store.idle_tokens) == (0, 32)
    assert found(store, HELLO) == 32
    assert found(store, [*HELLO, 99]) == 32
    assert found(store, HELLO[:32]) == 32
    assert found(store, HELLO[:31]) == 16
    assert found(store, HELLO[:15]) == 0
    assert found(store, [*HELLO[:20], 99, *HELLO[21:]]) == 16
    assert found(store, [99, *HELLO[1:]]) == 0


def test_the_same_page_after_other_ones_is_another() -> None:
    """Named by all that comes before, not by its own tokens."""
    store = make_store(16)
    page, other = [1] * PAGE_SIZE, [2] * PAGE_SIZE
    store.free(said(store, page + other))
    store.free(said(store, other + page))
    assert found(store, page + page) == 16
    assert found(store, page + other) == 32
    assert found(store, other + page) == 32
    assert found(store, other + other) == 16


def test_nothing_is_found_that_was_not_cached() -> None:
    store = make_store(16)
    sequence = store.open(len(HELLO))
    run(store, sequence, HELLO)
    assert found(store, HELLO) == 0
    store.cache_prefix(sequence, HELLO[:17])
    assert found(store, HELLO) == 16
    store.free(sequence)
    assert (found(store, HELLO), store.idle_tokens) == (16, 16)


def test_a_long_beginning_is_shared_while_it_is_used() -> None:
    """Memory holds it once; what each of the two says after it is its own."""
    store = make_store(64)
    prompt = list(range(160))
    first = said(store, prompt, 192)
    second = store.open(192)
    assert store.reuse_prefix(second, prompt) == 160
    assert store.used_tokens == 160 + 32 + 32
    assert first.first_row == second.first_row
    run(store, first, [*prompt, *range(500, 520)])
    run(store, second, [*prompt, *range(600, 630)])
    store.free(first)
    assert contents(store, second) == marks([*prompt, *range(600, 630)])
    store.check_integrity()


def test_a_short_beginning_is_copied_where_there_is_room() -> None:
    """So all of the sequence lies in one run, which attention reads in place."""
    store = make_store(64)
    first = said(store, HELLO, 128)
    second = store.open(128)
    assert store.reuse_prefix(second, HELLO) == 32
    assert second.run_start is not None
    assert second.first_row != first.first_row
    assert contents(store, second) == marks(HELLO)[:32]


def test_any_beginning_is_shared_where_memory_is_scarce() -> None:
    store = make_store(16)
    first, second = said(store, HELLO, 112), store.open(112)
    assert store.reuse_prefix(second, HELLO) == 32
    assert store.used_tokens == 112 + 112 - 32
    assert first.first_row == second.first_row
    third = store.open(64)
    assert store.reuse_prefix(third, HELLO) == 32
    assert contents(store, third) == contents(store, second) == marks(HELLO)[:32]
    store.check_integrity()


def test_what_is_held_already_is_lengthened() -> None:
    """From the middle of a page, which only one of the two has full."""
    store = make_store(32)
    store.free(said(store, HELLO))
    for max_len in (48, 200):
        sequence = store.open(max_len)
        run(store, sequence, HELLO[:21])
        assert store.reuse_prefix(sequence, HELLO) == 11
        assert store.reuse_prefix(sequence, HELLO) == 0
        assert contents(store, sequence) == marks(HELLO)[:32]
        store.check_integrity()
        store.free(sequence)


def test_two_who_say_the_same_at_once_have_one_place_in_the_cache() -> None:
    store = make_store(16)
    first, second = said(store, HELLO), said(store, [*HELLO, *range(70, 80)])
    store.check_integrity()
    store.free(first)
    assert (store.used_tokens, store.idle_tokens) == (64, 32)
    store.free(second)
    assert store.idle_tokens == 48, "the third page is the second one's alone"
    assert found(store, [*HELLO, *range(70, 80)]) == 48


def test_room_is_made_when_it_is_wanted() -> None:
    store = make_store(8)
    for start in (0, 100):
        store.free(said(store, list(range(start, start + 64))))
    assert (store.used_tokens, store.idle_tokens) == (0, 128)
    held = store.open(128)
    assert (store.used_tokens, store.idle_tokens) == (128, 0)
    with pytest.raises(KVFull, match="1 KV pages needed, 0 of 8 are free"):
        store.open(1)
    store.free(held)
    assert found(store, list(range(64))) == 0


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    store = make_store(16)
    texts = [list(range(start, start + 64)) for start in (0, 100, 200)]
    for text in texts:
        store.free(said(store, text))
    assert found(store, texts[0]) == 64
    press(store, 2)
    assert [found(store, text) for text in texts] == [64, 32, 64]
    # Looked at in this order, so the first is the oldest now.
    press(store, 3)
    assert [found(store, text) for text in texts] == [16, 32, 64]


def test_what_is_about_to_be_wanted_goes_last() -> None:
    """A request's own beginning is not what makes room for it."""
    store = make_store(8)
    texts = [list(range(start, start + 64)) for start in (0, 100)]
    for text in texts:
        store.free(said(store, text))
    store.touch_prefix(texts[0])
    sequence = store.open(64)
    assert store.reuse_prefix(sequence, texts[0]) == 64
    assert contents(store, sequence) == marks(texts[0])


def test_a_refused_request_evicts_nothing() -> None:
    store = make_store(8)
    store.free(said(store, list(range(64))))
    held = store.open(48)
    with pytest.raises(KVFull, match="6 KV pages needed"):
        store.open(96)
    store.free(held)
    assert found(store, list(range(64))) == 64


def test_what_is_in_use_is_not_evicted() -> None:
    store = make_store(8)
    held = said(store, HELLO)
    for start in (100, 200, 300):
        store.free(said(store, list(range(start, start + 80))))
    assert contents(store, held) == marks(HELLO)
    assert found(store, HELLO) == 32


def test_eviction_frees_pages_that_lie_together() -> None:
    """Else all sequences would be scattered as soon as the memory was full once."""
    store = make_store(64)
    for start in range(0, 1600, 100):
        store.free(said(store, list(range(start, start + 64))))
    assert store.idle_tokens == store.capacity_tokens
    for size in (64, 100, 256, 33, 200):
        assert store.open(size).run_start is not None, f"{size} tokens are scattered"


def test_rewriting_what_is_cached_takes_it_from_the_cache() -> None:
    """With no page free: nobody else uses it, so it is written in place."""
    store = make_store(3)
    sequence = said(store, HELLO)
    store.truncate(sequence, 20)
    assert contents(store, sequence) == marks(HELLO)[:20]
    store.check_integrity()
    run(store, sequence, [*HELLO[:20], *range(900, 920)])
    store.free(sequence)
    assert found(store, HELLO[:17]) == 16


def test_rewriting_what_others_use_copies_it() -> None:
    store = make_store(32)
    prompt = list(range(160))
    store.free(said(store, prompt))
    first, second = store.open(176), store.open(176)
    assert store.reuse_prefix(first, prompt) == store.reuse_prefix(second, prompt) == 160
    store.truncate(first, 100)
    run(store, first, [*prompt[:100], *range(900, 950)])
    assert contents(store, second) == marks(prompt)
    assert contents(store, first) == marks([*prompt[:100], *range(900, 950)])
    store.check_integrity()
    store.free(first)
    store.free(second)
    assert found(store, prompt) == 160


def test_growing_leaves_what_is_cached() -> None:
    store = make_store(16)
    sequence = said(store, HELLO)
    store.open(16)
    store.extend(sequence, 100)
    assert sequence.run_start is not None, "moved, for nobody else uses it"
    assert contents(store, sequence) == marks(HELLO)
    assert found(store, HELLO) == 32
    store.check_integrity()


def test_forks_of_what_is_reused() -> None:
    store = make_store(32)
    prompt = list(range(160))
    store.free(said(store, prompt))
    parent = store.open(192)
    store.reuse_prefix(parent, prompt)
    run(store, parent, [*prompt, 7, 7])
    child = store.fork(parent, 180, length=161)
    run(store, child, [*prompt, 7, 8, 9])
    store.cache_prefix(child, [*prompt, 7, 8, 9])
    store.free(parent)
    assert contents(store, child) == marks([*prompt, 7, 8, 9])
    store.check_integrity()


def test_integrity_check_finds_a_cached_page_that_may_be_written() -> None:
    store = make_store(8)
    sequence = said(store, HELLO)
    sequence.length = 20
    with pytest.raises(AssertionError, match="may write page"):
        store.check_integrity()


FAMILIES = ("llama", "mistral_window", "gemma3", "gpt2")


@pytest.mark.parametrize("max_len", [160, 400], ids=["shared", "copied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_is_the_same(
    family: str,
    max_len: int,
    engine_of: Callable[..., Engine],
    model_dir: Callable[[str], Path],
) -> None:
    """Logits after a beginning that was found equal those of a model that ran all of it."""
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
        shadow.assert_rows(logits, prompt, "after what was found")
    for held in (first, sequence):
        store.free(held)
    store.check_integrity()


def test_many_who_share_are_attended_together(
    engine_of: Callable[..., Engine], model_dir: Callable[[str], Path]
) -> None:
    """In one pass with one who does not, one token and several at a time."""
    engine, shadow = engine_of("llama"), Shadow(Reference(model_dir("llama")), 4)
    store, prompt = engine.store, shadow.random_tokens(128)
    alone = store.open(140)
    engine.forward([Append(alone, prompt, 0)])
    store.cache_prefix(alone, prompt)
    sequences, texts = [alone], [list(prompt)]
    for _ in range(4):
        sequences.append(store.open(140))
        texts.append(list(prompt))
        assert store.reuse_prefix(sequences[-1], prompt) == 128
    assert store.used_tokens == 144 + 4 * 16
    for count in (1, 4, 1):
        new = [shadow.random_tokens(count) for _ in sequences]
        asked = [Append(s, ids, count) for s, ids in zip(sequences, new, strict=True)]
        rows = torch.split(engine.forward(asked), count)
        for text, ids, logits in zip(texts, new, rows, strict=True):
            text += ids
            shadow.assert_rows(logits, text, f"{count} at a time")
    for sequence in sequences:
        store.free(sequence)
    store.check_integrity()


def test_token_ids_may_be_of_any_integer_type() -> None:
    store = make_store(8)
    store.free(said(store, HELLO))
    for kind in (np.int64, np.uint32, np.int32):
        sequence = store.open(40)
        assert store.reuse_prefix(sequence, np.array(HELLO, kind)) == 32
        store.free(sequence)
