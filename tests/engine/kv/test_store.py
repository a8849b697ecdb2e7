"""KV store: placement of sequences, isolation of forks, and refused operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.engine import KVStore, Sequence
from outrider.engine.kv.store import PAGE_SIZE, LayerLayout
from outrider.errors import KVFull

LAYOUT = LayerLayout(1, 1, 1, torch.int64, torch.device("cpu"))


def make_store(num_pages: int) -> KVStore:
    return KVStore([LAYOUT], num_pages)


def append(store: KVStore, sequence: Sequence, values: list[int]) -> None:
    """Write behind the length, then grow it, as a forward pass does."""
    rows = torch.from_numpy(store.slots(sequence, sequence.length, sequence.length + len(values)))
    store.keys[0][rows, 0, 0] = torch.tensor(values)
    store.values[0][rows, 0, 0] = -torch.tensor(values)
    sequence.length += len(values)


def contents(store: KVStore, sequence: Sequence) -> list[int]:
    rows = torch.from_numpy(store.slots(sequence, 0, sequence.length))
    keys = store.keys[0][rows, 0, 0]
    assert torch.equal(store.values[0][rows, 0, 0], -keys)
    values: list[int] = keys.tolist()
    return values


def test_open_beyond_capacity_reports_the_free_pages() -> None:
    store = make_store(4)
    store.open(40)
    with pytest.raises(KVFull, match="2 KV pages needed, 1 of 4 are free"):
        store.open(17)
    assert (store.used_tokens, store.num_sequences) == (48, 1)
    store.open(16)
    assert store.used_tokens == store.capacity_tokens == 64


def test_sequences_get_consecutive_rows() -> None:
    """Best fit: a free run that fits exactly is used before a longer one is split."""
    store = make_store(32)
    sequences = [store.open(5 * PAGE_SIZE) for _ in range(4)]
    store.free(sequences[1])
    hole = store.open(4 * PAGE_SIZE + 1)
    assert hole.run_start == 5 * PAGE_SIZE
    store.free(hole)
    longer = store.open(6 * PAGE_SIZE)
    assert longer.run_start == 20 * PAGE_SIZE


def test_extend_uses_the_following_pages_or_moves() -> None:
    store = make_store(12)
    first = store.open(20)
    append(store, first, list(range(1, 21)))
    store.extend(first, 40)
    assert first.run_start == 0
    store.open(16)
    store.extend(first, 64)
    assert first.run_start == 4 * PAGE_SIZE, "moved behind its neighbour"
    assert contents(store, first) == list(range(1, 21))
    store.check_integrity()


def test_extend_scatters_instead_of_failing() -> None:
    store = make_store(6)
    first, middle, last = store.open(32), store.open(32), store.open(32)
    append(store, last, list(range(1, 33)))
    store.free(first)
    store.extend(last, 64)
    assert last.run_start is None
    assert store.used_tokens == 96
    store.free(middle)
    store.compact(last)
    assert last.run_start is None, "no free run of four pages next to its two"
    assert contents(store, last) == list(range(1, 33))
    store.check_integrity()


def test_fork_shares_full_pages_only() -> None:
    store = make_store(16)
    parent = store.open(64)
    append(store, parent, list(range(1, 41)))
    used = store.used_tokens
    child = store.fork(parent, 50)
    assert store.used_tokens - used == 2 * PAGE_SIZE, "four pages, of which two are shared"
    append(store, parent, [100])
    append(store, child, [200, 201])
    assert contents(store, parent)[40:] == [100]
    assert contents(store, child)[40:] == [200, 201]
    store.free(parent)
    assert contents(store, child)[:40] == list(range(1, 41))
    store.check_integrity()


@pytest.mark.parametrize("length", [0, 5, 16, 33, 40])
def test_fork_of_the_first_tokens(length: int) -> None:
    store = make_store(16)
    parent = store.open(64)
    append(store, parent, list(range(1, 41)))
    used = store.used_tokens
    child = store.fork(parent, 50, length=length)
    assert contents(store, child) == list(range(1, length + 1))
    assert store.used_tokens - used == (4 - length // PAGE_SIZE) * PAGE_SIZE
    append(store, child, [200])
    append(store, parent, [100])
    assert contents(store, child) == [*range(1, length + 1), 200]
    assert contents(store, parent) == [*range(1, 41), 100]
    store.truncate(parent, 3)
    append(store, parent, [300] * 20)
    assert contents(store, child) == [*range(1, length + 1), 200]
    store.check_integrity()


def test_a_fork_of_a_fork_begins_with_the_same_rows() -> None:
    store = make_store(16)
    parent = store.open(64)
    append(store, parent, list(range(1, 41)))
    child = store.fork(parent, 64)
    append(store, child, [100] * 10)
    grandchild = store.fork(child, 64, length=49)
    assert parent.first_row == child.first_row == grandchild.first_row
    assert (parent.num_leading, child.num_leading, grandchild.num_leading) == (4, 2, 2)
    store.free(child)
    assert contents(store, grandchild) == [*range(1, 41), *[100] * 9]
    store.check_integrity()


@pytest.mark.parametrize("writer", ["parent", "child"])
def test_rewriting_a_shared_page_is_not_seen_by_the_other(writer: str) -> None:
    store = make_store(16)
    parent = store.open(64)
    append(store, parent, list(range(1, 41)))
    child = store.fork(parent, 64)
    mine, other = (parent, child) if writer == "parent" else (child, parent)
    store.truncate(mine, 5)
    append(store, mine, [500] * 30)
    assert contents(store, other) == list(range(1, 41))
    assert contents(store, mine) == [*range(1, 6), *[500] * 30]
    store.check_integrity()


def test_truncating_into_shared_pages_needs_free_pages() -> None:
    store = make_store(6)
    parent = store.open(48)
    append(store, parent, list(range(1, 41)))
    child = store.fork(parent, 48)
    store.open(32)
    with pytest.raises(KVFull):
        store.truncate(child, 20)
    assert (child.length, store.used_tokens) == (40, 96)
    store.truncate(child, 33)
    store.free(parent)
    store.truncate(child, 20)
    store.check_integrity()


def test_invalid_calls_are_refused() -> None:
    store, other = make_store(4), make_store(4)
    sequence = store.open(20)
    append(store, sequence, [1, 2, 3])
    for length in (-1, 4):
        with pytest.raises(ValueError, match="truncate"):
            store.truncate(sequence, length)
    with pytest.raises(ValueError, match="max_len"):
        store.open(0)
    for max_len, length in ((2, None), (2, 3), (20, 4), (20, -1)):
        with pytest.raises(ValueError, match="fork"):
            store.fork(sequence, max_len, length=length)
    with pytest.raises(ValueError, match="not open in this store"):
        other.free(sequence)
    store.free(sequence)
    for operation in (store.truncate, store.extend, store.fork):
        with pytest.raises(ValueError, match="not open"):
            operation(sequence, 1)
    assert store.used_tokens == 0


def test_integrity_check_finds_errors() -> None:
    store = make_store(4)
    sequence = store.open(40)
    store.check_integrity()
    sequence.length = 41
    with pytest.raises(AssertionError, match="too long"):
        store.check_integrity()
    sequence.length = 0
    sequence._pages[0] = 3
    with pytest.raises(AssertionError):
        store.check_integrity()


def test_slots_follow_the_pages() -> None:
    store = make_store(4)
    sequence = store.open(33)
    assert np.array_equal(store.slots(sequence, 14, 18), [14, 15, 16, 17])
