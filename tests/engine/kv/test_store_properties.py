"""KV store under random sequences of operations: contents, accounting and refusals."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.engine import Sequence
from outrider.engine.kv.sequence import pages_for
from outrider.engine.kv.store import PAGE_SIZE
from outrider.errors import KVFull
from tests.engine.kv.test_store import append, contents, make_store


class StoreMachine(RuleBasedStateMachine):
    """Every sequence must hold exactly the values appended to it, whatever the other operations."""

    @initialize(num_pages=st.integers(1, 24))
    def make(self, num_pages: int) -> None:
        self.store = make_store(num_pages)
        self.values_of: dict[Sequence, list[int]] = {}
        self.next_value = 1

    def pick(self, index: int) -> Sequence:
        return list(self.values_of)[index % len(self.values_of)]

    def pick_running(self, index: int) -> Sequence | None:
        """A sequence that is not evictable."""
        running = [sequence for sequence in self.values_of if not sequence.is_evictable]
        return running[index % len(running)] if running else None

    def snapshot(self) -> tuple[int, list[tuple[int, int]]]:
        return self.store.used_tokens, [(s.length, s.max_len) for s in self.values_of]

    def pages_of(self, sequences: Iterable[Sequence]) -> set[int]:
        """All pages reserved by these sequences."""
        return {int(p) for s in sequences for p in self.store.page_ids(s, s.max_len)}

    @property
    def num_free(self) -> int:
        """Pages that are not reserved: spare ones can be taken."""
        return self.store.num_pages - len(self.pages_of(self.values_of))

    @rule(max_len=st.integers(0, 100), expected_len=st.integers(1, 400))
    def open(self, max_len: int, expected_len: int) -> None:
        before = self.snapshot()
        try:
            self.values_of[self.store.open(max_len, expected_len)] = []
        except KVFull:
            assert pages_for(max_len) > self.num_free, "refused although enough pages were free"
            assert self.snapshot() == before

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9), count=st.integers(1, 60))
    def append(self, index: int, count: int) -> None:
        sequence = self.pick_running(index)
        if sequence is None:
            return
        count = min(count, sequence.max_len - sequence.length)
        values = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        if values:
            append(self.store, sequence, values)
            self.values_of[sequence] += values

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, index: int, part: float) -> None:
        sequence = self.pick_running(index)
        if sequence is None:
            return
        length = int(part * sequence.length)
        before = self.snapshot()
        try:
            self.store.truncate(sequence, length)
            del self.values_of[sequence][length:]
        except KVFull:
            assert self.snapshot() == before

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9), more=st.integers(-20, 60), margin=st.integers(0, 6))
    def extend(self, index: int, more: int, margin: int) -> None:
        """Refused only if the pages and the margin are not available; spare pages are available."""
        sequence = self.pick_running(index)
        if sequence is None:
            return
        before, max_len = self.snapshot(), sequence.max_len
        missing = pages_for(max_len + more) - pages_for(max_len)
        try:
            self.store.extend(sequence, max_len + more, margin=margin)
            assert sequence.max_len == max(max_len, max_len + more)
        except KVFull:
            assert missing + margin > self.num_free, "refused although enough pages were free"
            assert self.snapshot() == before

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9))
    def make_evictable(self, index: int) -> None:
        """Its pages do not count as used, but remain its own."""
        sequence = self.pick(index)
        if sequence.is_evictable:
            self.store.make_active(sequence, sequence.length + 100)
        else:
            self.store.make_evictable(sequence)

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9), more=st.integers(0, 60))
    def shrink(self, index: int, more: int) -> None:
        sequence = self.pick_running(index)
        if sequence is None:
            return
        max_len, used = sequence.max_len, self.store.used_tokens
        new_len = sequence.length + more
        self.store.shrink(sequence, new_len)
        assert sequence.max_len == min(max_len, new_len)
        assert self.store.used_tokens <= used

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9), more=st.integers(1, 40), part=st.none() | st.floats(0, 1))
    def fork(self, index: int, more: int, part: float | None) -> None:
        sequence = self.pick_running(index)
        if sequence is None:
            return
        before = self.snapshot()
        length = None if part is None else int(part * sequence.length)
        try:
            child = self.store.fork(sequence, sequence.length + more, length=length)
            self.values_of[child] = self.values_of[sequence][:length]
        except KVFull:
            assert self.snapshot() == before

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9))
    def compact(self, index: int) -> None:
        if (sequence := self.pick_running(index)) is not None:
            self.store.compact(sequence)

    @precondition(lambda self: self.values_of)
    @rule(index=st.integers(0, 9))
    def free(self, index: int) -> None:
        sequence = self.pick(index)
        self.store.free(sequence)
        del self.values_of[sequence]
        with pytest.raises(ValueError, match="not open"):
            self.store.free(sequence)

    @invariant()
    def everything_agrees(self) -> None:
        self.store.check_integrity()
        assert self.store.num_sequences == len(self.values_of)
        running = self.pages_of(s for s in self.values_of if not s.is_evictable)
        assert self.store.used_tokens == len(running) * PAGE_SIZE, (
            "exactly reserved pages count as used"
        )
        for sequence, values in self.values_of.items():
            assert contents(self.store, sequence) == values

    def teardown(self) -> None:
        sequences = list(getattr(self, "values_of", ()))
        for sequence in sequences[1:]:
            self.store.free(sequence)
        for sequence in sequences[:1]:
            if sequence.is_evictable:
                self.store.make_active(sequence, sequence.max_len)
            self.store.extend(sequence, self.store.capacity_tokens)
            assert contents(self.store, sequence) == self.values_of[sequence]
            self.store.check_integrity()
            self.store.free(sequence)
        if hasattr(self, "store"):
            assert self.store.used_tokens == 0


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
