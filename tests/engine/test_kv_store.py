"""The KV store's accounting under any order of operations, and what forks see of each other."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.engine import KVStore, Sequence
from outrider.engine.kv_store import PAGE_SIZE, LayerLayout
from outrider.errors import KVFull

LAYOUT = LayerLayout(1, 1, 1, torch.int64, torch.device("cpu"))


def make_store(num_pages: int) -> KVStore:
    return KVStore([LAYOUT], num_pages)


def append(store: KVStore, sequence: Sequence, values: list[int]) -> None:
    """What a forward does to a store: writes behind the length, then grows it."""
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


class StoreMachine(RuleBasedStateMachine):
    """Every sequence must hold exactly the values appended to it, whatever happens around it."""

    @initialize(num_pages=st.integers(1, 24))
    def make(self, num_pages: int) -> None:
        self.store = make_store(num_pages)
        self.held: dict[Sequence, list[int]] = {}
        self.next_value = 1

    def pick(self, index: int) -> Sequence:
        return list(self.held)[index % len(self.held)]

    def snapshot(self) -> tuple[int, list[tuple[int, int]]]:
        return self.store.used_tokens, [(s.length, s.max_len) for s in self.held]

    @rule(max_len=st.integers(1, 100))
    def open(self, max_len: int) -> None:
        before = self.snapshot()
        try:
            self.held[self.store.open(max_len)] = []
        except KVFull:
            free = self.store.capacity_tokens - self.store.used_tokens
            assert max_len > free, "refused although there was room"
            assert self.snapshot() == before

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), count=st.integers(1, 60))
    def append(self, index: int, count: int) -> None:
        sequence = self.pick(index)
        count = min(count, sequence.max_len - sequence.length)
        values = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        if values:
            append(self.store, sequence, values)
            self.held[sequence] += values

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, index: int, part: float) -> None:
        sequence = self.pick(index)
        length = int(part * sequence.length)
        before = self.snapshot()
        try:
            self.store.truncate(sequence, length)
            del self.held[sequence][length:]
        except KVFull:
            assert self.snapshot() == before

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), more=st.integers(-20, 60))
    def extend(self, index: int, more: int) -> None:
        sequence = self.pick(index)
        before = self.snapshot()
        max_len = sequence.max_len
        try:
            self.store.extend(sequence, max_len + more)
            assert sequence.max_len == max(max_len, max_len + more)
        except KVFull:
            assert self.snapshot() == before

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), more=st.integers(1, 40))
    def fork(self, index: int, more: int) -> None:
        sequence = self.pick(index)
        before = self.snapshot()
        try:
            child = self.store.fork(sequence, sequence.length + more)
            self.held[child] = list(self.held[sequence])
        except KVFull:
            assert self.snapshot() == before

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def compact(self, index: int) -> None:
        self.store.compact(self.pick(index))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def free(self, index: int) -> None:
        sequence = self.pick(index)
        self.store.free(sequence)
        del self.held[sequence]
        with pytest.raises(ValueError, match="not open"):
            self.store.free(sequence)

    @invariant()
    def everything_agrees(self) -> None:
        self.store.check_integrity()
        assert self.store.num_sequences == len(self.held)
        for sequence, values in self.held.items():
            assert contents(self.store, sequence) == values

    def teardown(self) -> None:
        for sequence in list(getattr(self, "held", ())):
            self.store.free(sequence)
        if hasattr(self, "store"):
            assert self.store.used_tokens == 0


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)


def test_open_beyond_capacity_says_how_much_is_free() -> None:
    store = make_store(4)
    store.open(40)
    with pytest.raises(KVFull, match="2 KV pages needed, 1 of 4 are free"):
        store.open(17)
    assert (store.used_tokens, store.num_sequences) == (48, 1)
    store.open(16)
    assert store.used_tokens == store.capacity_tokens == 64


def test_sequences_get_consecutive_rows() -> None:
    """Best fit: a hole that fits exactly is used before the long free run is cut."""
    store = make_store(32)
    sequences = [store.open(5 * PAGE_SIZE) for _ in range(4)]
    store.free(sequences[1])
    hole = store.open(4 * PAGE_SIZE + 1)
    assert hole.run_start == 5 * PAGE_SIZE
    store.free(hole)
    longer = store.open(6 * PAGE_SIZE)
    assert longer.run_start == 20 * PAGE_SIZE


def test_extend_takes_the_next_pages_or_moves() -> None:
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


def test_extend_scatters_rather_than_fails() -> None:
    store = make_store(6)
    first, middle, last = store.open(32), store.open(32), store.open(32)
    append(store, last, list(range(1, 33)))
    store.free(first)
    store.extend(last, 64)
    assert last.run_start is None
    assert store.used_tokens == 96
    store.free(middle)
    store.compact(last)
    assert last.run_start is None, "no run of four pages beside the two it has"
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


def test_truncating_into_shared_pages_needs_room() -> None:
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


def test_misuse_is_refused() -> None:
    store, other = make_store(4), make_store(4)
    sequence = store.open(20)
    append(store, sequence, [1, 2, 3])
    for length in (-1, 4):
        with pytest.raises(ValueError, match="truncate"):
            store.truncate(sequence, length)
    with pytest.raises(ValueError, match="max_len"):
        store.open(0)
    with pytest.raises(ValueError, match="fork"):
        store.fork(sequence, 2)
    with pytest.raises(ValueError, match="not open in this store"):
        other.free(sequence)
    store.free(sequence)
    for operation in (store.truncate, store.extend, store.fork):
        with pytest.raises(ValueError, match="not open"):
            operation(sequence, 1)
    assert store.used_tokens == 0


def test_integrity_check_finds_what_is_wrong() -> None:
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
