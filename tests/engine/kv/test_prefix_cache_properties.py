"""KV store with its prefix cache under random operations, compared with lists of tokens."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.engine import Sequence
from outrider.engine.kv.store import PAGE_SIZE
from outrider.errors import KVFull
from tests.engine.kv.test_prefix_cache import kv_of, run
from tests.engine.kv.test_store import contents, make_store

# Words of half a page, of two kinds: texts share prefixes and differ within pages too.
WORD = PAGE_SIZE // 2
WORDS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


def text(words: list[int]) -> list[int]:
    return [word for word in words for _ in range(WORD)]


class CachingMachine(RuleBasedStateMachine):
    """Every sequence holds the KV of its tokens, whether computed or found in the cache.

    `cached`: every prefix of full pages that was ever cached; no other prefix may be found.
    """

    @initialize(num_pages=st.integers(2, 24))
    def make(self, num_pages: int) -> None:
        self.store = make_store(num_pages)
        self.tokens_of: dict[Sequence, list[int]] = {}
        self.cached: set[tuple[int, ...]] = {()}

    def pick(self, index: int) -> Sequence:
        return list(self.tokens_of)[index % len(self.tokens_of)]

    @property
    def num_unused(self) -> int:
        return (self.store.capacity_tokens - self.store.used_tokens) // PAGE_SIZE

    def note_cached(self, token_ids: list[int]) -> None:
        for stop in range(PAGE_SIZE, len(token_ids) + 1, PAGE_SIZE):
            self.cached.add(tuple(token_ids[:stop]))

    @rule(words=WORDS, more=st.integers(1, 40))
    def open(self, words: list[int], more: int) -> None:
        """Refused only if pages in use leave too few; otherwise begins with the cached prefix."""
        token_ids = text(words)
        max_len = len(token_ids) + more
        num_unused, before = self.num_unused, (self.store.used_tokens, self.store.idle_tokens)
        try:
            sequence = self.store.open(max_len)
        except KVFull:
            assert -(-max_len // PAGE_SIZE) > num_unused, "refused although enough pages were free"
            assert (self.store.used_tokens, self.store.idle_tokens) == before
            return
        assert -(-max_len // PAGE_SIZE) <= num_unused
        self.reuse_into(sequence, [], token_ids)

    def reuse_into(self, sequence: Sequence, tokens: list[int], token_ids: list[int]) -> None:
        used = self.store.used_tokens
        num_found = self.store.reuse_prefix(sequence, token_ids)
        assert self.store.used_tokens <= used, "re-use must not need pages"
        if num_found:
            assert sequence.length % PAGE_SIZE == 0
            assert tuple(token_ids[: sequence.length]) in self.cached
            tokens = token_ids[: sequence.length]
        self.tokens_of[sequence] = tokens

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), words=WORDS)
    def reuse_more(self, index: int, words: list[int]) -> None:
        sequence = self.pick(index)
        tokens = self.tokens_of[sequence]
        self.reuse_into(sequence, tokens, tokens + text(words))

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), words=WORDS, cut=st.integers(0, WORD))
    def append(self, index: int, words: list[int], cut: int) -> None:
        sequence = self.pick(index)
        tokens = self.tokens_of[sequence]
        tokens = (tokens + text(words)[cut:])[: sequence.max_len]
        if len(tokens) > sequence.length:
            run(self.store, sequence, tokens)
            self.tokens_of[sequence] = tokens

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def truncate(self, index: int, part: float) -> None:
        sequence = self.pick(index)
        length = int(part * sequence.length)
        try:
            self.store.truncate(sequence, length)
            del self.tokens_of[sequence][length:]
        except KVFull:
            assert self.num_unused < sequence.length // PAGE_SIZE + 1, (
                "refused although pages for a copy were free"
            )

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), more=st.integers(1, 60))
    def extend(self, index: int, more: int) -> None:
        sequence = self.pick(index)
        missing = -(-(sequence.max_len + more) // PAGE_SIZE) - -(-sequence.max_len // PAGE_SIZE)
        num_unused = self.num_unused
        try:
            self.store.extend(sequence, sequence.max_len + more)
        except KVFull:
            assert missing > num_unused

    @precondition(lambda self: self.tokens_of)
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
        """Uses only pages that are not shared; refused only if those are not available."""
        sequence = self.store.open(0, 400) if want else self.pick(index)
        tokens = self.tokens_of.setdefault(sequence, [])
        token_ids = tokens + text(words)
        max_len = max(sequence.max_len, len(token_ids) + more)
        missing = -(-max_len // PAGE_SIZE) - -(-sequence.max_len // PAGE_SIZE)
        num_unused, used, idle = self.num_unused, self.store.used_tokens, self.store.idle_tokens
        try:
            num_found = self.store.extend_with_prefix(sequence, max_len, token_ids, margin=margin)
        except KVFull:
            assert missing + margin > num_unused
            assert (self.store.used_tokens, len(tokens)) == (used, sequence.length)
            assert self.store.idle_tokens == idle, "nothing was evicted"
            return
        assert sequence.max_len == max_len
        assert self.store.used_tokens <= used + missing * PAGE_SIZE
        if num_found:
            assert tuple(token_ids[: sequence.length]) in self.cached
            self.tokens_of[sequence] = token_ids[: sequence.length]

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9))
    def shrink(self, index: int) -> None:
        sequence = self.pick(index)
        self.store.shrink(sequence, sequence.length)

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), more=st.integers(1, 40), part=st.floats(0, 1))
    def fork(self, index: int, more: int, part: float) -> None:
        sequence = self.pick(index)
        length = int(part * sequence.length)
        num_own = -(-(sequence.length + more) // PAGE_SIZE) - length // PAGE_SIZE
        num_unused = self.num_unused
        try:
            child = self.store.fork(sequence, sequence.length + more, length=length)
            self.tokens_of[child] = self.tokens_of[sequence][:length]
        except KVFull:
            assert num_own > num_unused

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9))
    def compact(self, index: int) -> None:
        self.store.compact(self.pick(index))

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), part=st.floats(0, 1))
    def cache(self, index: int, part: float) -> None:
        """A prefix just cached is found, as long as nothing has to be evicted."""
        sequence = self.pick(index)
        tokens = self.tokens_of[sequence]
        committed = tokens[: int(part * len(tokens))]
        self.store.cache_prefix(sequence, committed)
        self.note_cached(committed)
        num_free = self.num_unused - self.store.idle_tokens // PAGE_SIZE
        if committed and num_free >= -(-len(committed) // PAGE_SIZE):
            other = self.store.open(len(committed))
            num_found = self.store.reuse_prefix(other, committed)
            assert num_found == len(committed) // PAGE_SIZE * PAGE_SIZE
            assert contents(self.store, other) == kv_of(committed)[:num_found]
            self.store.free(other)

    @precondition(lambda self: self.tokens_of)
    @rule(index=st.integers(0, 9), is_cached=st.booleans())
    def free(self, index: int, is_cached: bool) -> None:
        sequence = self.pick(index)
        tokens = self.tokens_of.pop(sequence)
        if is_cached:
            self.store.cache_prefix(sequence, tokens)
            self.note_cached(tokens)
        self.store.free(sequence)

    @invariant()
    def everything_agrees(self) -> None:
        self.store.check_integrity()
        assert self.store.num_sequences == len(self.tokens_of)
        for sequence, tokens in self.tokens_of.items():
            assert contents(self.store, sequence) == kv_of(tokens)

    def teardown(self) -> None:
        for sequence in list(getattr(self, "tokens_of", ())):
            self.store.free(sequence)
        if hasattr(self, "store"):
            assert self.store.used_tokens == 0
            self.store.free(self.store.open(self.store.capacity_tokens))
            assert self.store.idle_tokens == 0, "idle pages must be available"
            self.store.check_integrity()


TestCaching = CachingMachine.TestCase
TestCaching.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True
)
