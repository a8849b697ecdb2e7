"""The KV store with its prefix cache under any order of operations, against lists of tokens."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.engine import Sequence
from outrider.engine.kv.store import PAGE_SIZE
from outrider.errors import KVFull
from tests.engine.kv.test_prefix_cache import marks, run
from tests.engine.kv.test_store import contents, make_store

# Words of half a page, of two kinds: texts begin alike, and part in the middle of pages too.
WORD = PAGE_SIZE // 2
WORDS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


def text(words: list[int]) -> list[int]:
    return [word for word in words for _ in range(WORD)]


class CachingMachine(RuleBasedStateMachine):
    """Every sequence holds what its tokens say, however much of it was found and not run.

    `cached`: every beginning that was ever cached, by full pages; none else may be found.
    """

    @initialize(num_pages=st.integers(2, 24))
    def make(self, num_pages: int) -> None:
        self.store = make_store(num_pages)
        self.held: dict[Sequence, list[int]] = {}
        self.cached: set[tuple[int, ...]] = {()}

    def pick(self, index: int) -> Sequence:
        return list(self.held)[index % len(self.held)]

    @property
    def num_unused(self) -> int:
        return (self.store.capacity_tokens - self.store.used_tokens) // PAGE_SIZE

    def note_cached(self, token_ids: list[int]) -> None:
        for stop in range(PAGE_SIZE, len(token_ids) + 1, PAGE_SIZE):
            self.cached.add(tuple(token_ids[:stop]))

    @rule(words=WORDS, more=st.integers(1, 40))
    def open(self, words: list[int], more: int) -> None:
        """Refused only where what is in use leaves no room; else begins with what is known."""
        token_ids = text(words)
        max_len = len(token_ids) + more
        num_unused, before = self.num_unused, (self.store.used_tokens, self.store.idle_tokens)
        try:
            sequence = self.store.open(max_len)
        except KVFull:
            assert -(-max_len // PAGE_SIZE) > num_unused, "refused although there was room"
            assert (self.store.used_tokens, self.store.idle_tokens) == before
            return
        assert -(-max_len // PAGE_SIZE) <= num_unused
        self.reuse_into(sequence, [], token_ids)

    def reuse_into(self, sequence: Sequence, said: list[int], token_ids: list[int]) -> None:
        used = self.store.used_tokens
        num_found = self.store.reuse_prefix(sequence, token_ids)
        assert self.store.used_tokens <= used, "it takes no room"
        if num_found:
            assert sequence.length % PAGE_SIZE == 0
            assert tuple(token_ids[: sequence.length]) in self.cached
            said = token_ids[: sequence.length]
        self.held[sequence] = said

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), words=WORDS)
    def reuse_more(self, index: int, words: list[int]) -> None:
        sequence = self.pick(index)
        said = self.held[sequence]
        self.reuse_into(sequence, said, said + text(words))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), words=WORDS, cut=st.integers(0, WORD))
    def append(self, index: int, words: list[int], cut: int) -> None:
        sequence = self.pick(index)
        said = self.held[sequence]
        said = (said + text(words)[cut:])[: sequence.max_len]
        if len(said) > sequence.length:
            run(self.store, sequence, said)
            self.held[sequence] = said

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, index: int, part: float) -> None:
        sequence = self.pick(index)
        length = int(part * sequence.length)
        try:
            self.store.truncate(sequence, length)
            del self.held[sequence][length:]
        except KVFull:
            assert self.num_unused < sequence.length // PAGE_SIZE + 1, "there was room for a copy"

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), more=st.integers(1, 60))
    def extend(self, index: int, more: int) -> None:
        sequence = self.pick(index)
        missing = -(-(sequence.max_len + more) // PAGE_SIZE) - -(-sequence.max_len // PAGE_SIZE)
        num_unused = self.num_unused
        try:
            self.store.extend(sequence, sequence.max_len + more)
        except KVFull:
            assert missing > num_unused

    @precondition(lambda self: self.held)
    @rule(
        index=st.integers(0, 9),
        words=WORDS,
        more=st.integers(0, 60),
        margin=st.integers(0, 3),
        want=st.booleans(),
    )
    def extend_with_prefix(
        self, index: int, words: list[int], more: int, margin: int, want: bool
    ) -> None:
        """Takes no more than what is not shared; refused only where there is no room for that."""
        sequence = self.store.open(0, 400) if want else self.pick(index)
        said = self.held.setdefault(sequence, [])
        token_ids = said + text(words)
        max_len = max(sequence.max_len, len(token_ids) + more)
        missing = -(-max_len // PAGE_SIZE) - -(-sequence.max_len // PAGE_SIZE)
        num_unused, used, idle = self.num_unused, self.store.used_tokens, self.store.idle_tokens
        try:
            num_found = self.store.extend_with_prefix(sequence, max_len, token_ids, margin=margin)
        except KVFull:
            assert missing + margin > num_unused
            assert (self.store.used_tokens, len(said)) == (used, sequence.length)
            assert self.store.idle_tokens == idle, "nothing was evicted"
            return
        assert sequence.max_len == max_len
        assert self.store.used_tokens <= used + missing * PAGE_SIZE
        if num_found:
            assert tuple(token_ids[: sequence.length]) in self.cached
            self.held[sequence] = token_ids[: sequence.length]

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def shrink(self, index: int) -> None:
        sequence = self.pick(index)
        self.store.shrink(sequence, sequence.length)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), more=st.integers(1, 40), part=st.floats(0, 1))
    def fork(self, index: int, more: int, part: float) -> None:
        sequence = self.pick(index)
        length = int(part * sequence.length)
        num_own = -(-(sequence.length + more) // PAGE_SIZE) - length // PAGE_SIZE
        num_unused = self.num_unused
        try:
            child = self.store.fork(sequence, sequence.length + more, length=length)
            self.held[child] = self.held[sequence][:length]
        except KVFull:
            assert num_own > num_unused

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9))
    def compact(self, index: int) -> None:
        self.store.compact(self.pick(index))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def cache(self, index: int, part: float) -> None:
        """What was just cached is found, as long as nothing has to go for it."""
        sequence = self.pick(index)
        said = self.held[sequence]
        committed = said[: int(part * len(said))]
        self.store.cache_prefix(sequence, committed)
        self.note_cached(committed)
        num_free = self.num_unused - self.store.idle_tokens // PAGE_SIZE
        if committed and num_free >= -(-len(committed) // PAGE_SIZE):
            other = self.store.open(len(committed))
            num_found = self.store.reuse_prefix(other, committed)
            assert num_found == len(committed) // PAGE_SIZE * PAGE_SIZE
            assert contents(self.store, other) == marks(committed)[:num_found]
            self.store.free(other)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 9), is_cached=st.booleans())
    def free(self, index: int, is_cached: bool) -> None:
        sequence = self.pick(index)
        said = self.held.pop(sequence)
        if is_cached:
            self.store.cache_prefix(sequence, said)
            self.note_cached(said)
        self.store.free(sequence)

    @invariant()
    def everything_agrees(self) -> None:
        self.store.check_integrity()
        assert self.store.num_sequences == len(self.held)
        for sequence, said in self.held.items():
            assert contents(self.store, sequence) == marks(said)

    def teardown(self) -> None:
        for sequence in list(getattr(self, "held", ())):
            self.store.free(sequence)
        if hasattr(self, "store"):
            assert self.store.used_tokens == 0
            self.store.free(self.store.open(self.store.capacity_tokens))
            assert self.store.idle_tokens == 0, "all of the memory can be had"
            self.store.check_integrity()


TestCaching = CachingMachine.TestCase
TestCaching.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)
