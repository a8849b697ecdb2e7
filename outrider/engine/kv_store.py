"""Keys and values of all sequences: paged memory, and who may write where.

Knows lengths, pages and tensors; nothing about models or attention, and of token ids only that the
prefix cache goes by them.

Invariant that the rest relies on: every page of a sequence that an append may still write
(from the page of position `length` on) has that sequence as its only owner. So an append
never allocates and never fails for want of room, and what is shared or cached is never written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq

import numpy as np

from outrider.engine.kv_rows import KVRows, LayerLayout
from outrider.engine.pages import PAGE_SIZE, PageAllocator
from outrider.engine.prefix_cache import PrefixCache, TokenIds
from outrider.engine.sequence import Sequence, leading_run, pages_for

__all__ = ["PAGE_SIZE", "KVStore", "LayerLayout", "Sequence"]


class KVStore:
    """Memory for keys and values: per layer, K and V as [num_pages * 16, num_heads, dim].

    The accounting is behind a lock, so admission may run beside a forward pass; but a sequence
    must not be truncated, extended or freed while a forward that appends to it is running.
    """

    def __init__(self, layers: Seq[LayerLayout], num_pages: int) -> None:
        self._allocator = PageAllocator(num_pages)
        self._cache = PrefixCache(self._allocator)
        self._sequences: set[Sequence] = set()
        self._lock = threading.Lock()
        self.scratch_page = num_pages
        """A page that no sequence has: rows that only fill up a batch may be written there."""
        self._rows = KVRows(layers, (num_pages + 1) * PAGE_SIZE)
        self.keys, self.values = self._rows.keys, self._rows.values

    @property
    def capacity_tokens(self) -> int:
        return self._allocator.num_pages * PAGE_SIZE

    @property
    def used_tokens(self) -> int:
        """Tokens in reserved pages; a page that several sequences share counts once.

        Not those that are only cached: their room is there for the asking.
        """
        return (self._allocator.num_pages - self._cache.num_available) * PAGE_SIZE

    @property
    def idle_tokens(self) -> int:
        """Tokens in pages that only the prefix cache holds."""
        return self._cache.num_idle * PAGE_SIZE

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def open(self, max_len: int) -> Sequence:
        """An empty sequence with room for `max_len` tokens. Raises KVFull, reserving nothing."""
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        with self._lock:
            return self._adopt(Sequence(self, max_len, self._cache.take(pages_for(max_len))))

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forgets the tokens from `length` on; the reservation stays.

        Raises KVFull, changing nothing, only if the cut falls inside pages shared with a fork
        (they have to be replaced before they can be written again) and no pages are free.
        """
        with self._lock:
            self._check_alive(sequence)
            if not 0 <= length <= sequence.length:
                raise ValueError(f"cannot truncate {sequence} to {length} tokens")
            self._own_from(sequence, length)
            sequence.length = length

    def extend(self, sequence: Sequence, max_len: int) -> None:
        """Grows the reservation to `max_len` tokens. Raises KVFull, leaving it as it was."""
        with self._lock:
            self._check_alive(sequence)
            missing = pages_for(max_len) - len(sequence._pages)
            if missing > 0:
                self._grow(sequence, missing)
            sequence.max_len = max(sequence.max_len, max_len)

    def shrink(self, sequence: Sequence, max_len: int) -> None:
        """Gives back what the reservation has beyond `max_len` tokens, which must hold `length`."""
        with self._lock:
            self._check_alive(sequence)
            if max_len < max(1, sequence.length):
                raise ValueError(f"cannot shrink {sequence} to {max_len} tokens")
            num_pages = pages_for(max_len)
            self._cache.release(sequence._pages[num_pages:])
            del sequence._pages[num_pages:]
            sequence.max_len = min(sequence.max_len, max_len)
            sequence.num_leading = min(sequence.num_leading, num_pages)

    def fork(self, sequence: Sequence, max_len: int, length: int | None = None) -> Sequence:
        """A second sequence with the first `length` tokens (None: all) and room for `max_len`.

        Full pages are shared, a partly filled last one is copied; neither sequence sees what
        the other does from here on. Raises KVFull, changing nothing.
        """
        with self._lock:
            self._check_alive(sequence)
            length = sequence.length if length is None else length
            if not 0 <= length <= sequence.length:
                raise ValueError(f"cannot fork {sequence} at {length} tokens")
            if max_len < max(1, length):
                raise ValueError(f"a fork of {sequence} cannot have room for {max_len} tokens")
            num_shared, num_copied = divmod(length, PAGE_SIZE)
            own = self._cache.take(pages_for(max_len) - num_shared)
            shared = sequence._pages[:num_shared]
            self._allocator.share(shared)
            known = min(sequence.num_leading, num_shared)
            child = self._adopt(Sequence(self, max_len, shared + own, known))
            child._num_lent = num_shared
            sequence._num_lent = max(sequence._num_lent, num_shared)
            if num_copied:
                source = sequence._pages[num_shared] * PAGE_SIZE
                self._rows.copy(source, own[0] * PAGE_SIZE, num_copied)
            child.length = length
            return child

    def cache_prefix(self, sequence: Sequence, token_ids: TokenIds) -> None:
        """Lets others re-use the full pages of `sequence`, which holds `token_ids` first."""
        with self._lock:
            self._check_alive(sequence)
            num_full = min(len(token_ids), sequence.length) // PAGE_SIZE
            pages = sequence._pages[:num_full]
            self._cache.insert(token_ids[: num_full * PAGE_SIZE], pages)
            sequence._num_lent = max(sequence._num_lent, num_full)

    def touch_prefix(self, token_ids: TokenIds) -> None:
        """What is cached of the tokens is about to be wanted: it counts as used just now."""
        with self._lock:
            self._cache.match(token_ids)

    def forget_prefix(self, token_ids: TokenIds) -> None:
        """Nothing of a text that begins with the first page of these tokens is cached any more."""
        with self._lock:
            for page in self._cache.match(token_ids)[:1]:
                self._cache.forget(page)

    def reuse_prefix(self, sequence: Sequence, token_ids: TokenIds) -> int:
        """Lengthens `sequence`, which holds the first of `token_ids`, by what is cached of them.

        By full pages; returns by how many tokens. Takes no room, so it never fails for want of it.
        """
        with self._lock:
            self._check_alive(sequence)
            found = self._cache.match(token_ids)[: sequence.max_len // PAGE_SIZE]
            start, stop = sequence.length, len(found) * PAGE_SIZE
            if stop <= start:
                return 0
            if self._is_better_shared(sequence, found):
                self._replace(sequence, start // PAGE_SIZE, found)
            else:
                rows = np.asarray(found)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
                self._rows.copy_scattered(
                    rows.reshape(-1)[start:], self.slots(sequence, start, stop)
                )
            sequence.length = stop
            return stop - start

    def graft(self, sequence: Sequence, source: Sequence, length: int) -> None:
        """Appends to `sequence` what `source` holds of positions [sequence.length, length).

        `source` keeps its own. Raises ValueError where there is nothing such or no room for it.
        """
        with self._lock:
            self._check_alive(sequence)
            self._check_alive(source)
            if not sequence.length <= length <= min(sequence.max_len, source.length):
                raise ValueError(f"cannot append to {sequence} up to {length} of {source}")
            start = sequence.length
            self._rows.copy_scattered(
                self.slots(source, start, length), self.slots(sequence, start, length)
            )
            sequence.length = length

    def free(self, sequence: Sequence) -> None:
        """Gives the reservation back. Raises ValueError for a sequence that is not open here."""
        with self._lock:
            self._check_alive(sequence)
            self._sequences.remove(sequence)
            self._cache.release(sequence._pages)
            sequence._store = None
            sequence._pages = []
            sequence.num_leading = 0

    def compact(self, sequence: Sequence) -> None:
        """Moves a scattered sequence to consecutive pages if it shares none and there are any.

        A scattered history is gathered by every layer at every step; moving it once costs
        about as much as one such step.
        """
        with self._lock:
            self._check_alive(sequence)
            if sequence.run_start is None:
                self._move(sequence, len(sequence._pages))

    def slots(self, sequence: Sequence, start: int, stop: int) -> np.ndarray:
        """Rows of the layers' tensors that hold positions [start, stop): int64 [stop - start]."""
        return sequence.slots(start, stop)

    def page_ids(self, sequence: Sequence, num_tokens: int) -> np.ndarray:
        """The pages that hold the first `num_tokens` positions, in order: int32."""
        return sequence.page_ids(num_tokens)

    def owns(self, sequence: Sequence) -> bool:
        return sequence._store is self

    def check_integrity(self) -> None:
        """Asserts that pages, owners, reservations and lengths agree."""
        with self._lock:
            owned = [sequence._pages for sequence in self._sequences]
            self._allocator.check_integrity([*owned, self._cache.pages])
            self._cache.check_integrity()
            for sequence in self._sequences:
                assert sequence._store is self, f"{sequence} belongs to another store"
                sequence.check_integrity(self._allocator.num_owners)

    def _adopt(self, sequence: Sequence) -> Sequence:
        self._sequences.add(sequence)
        return sequence

    def _check_alive(self, sequence: Sequence) -> None:
        if sequence._store is not self:
            raise ValueError(f"{sequence} is not open in this store")

    def _own_from(self, sequence: Sequence, length: int) -> None:
        """Replaces pages that others use from the page of position `length` on (copy-on-write).

        Those that are only cached leave the cache instead: that needs no room.
        """
        first = length // PAGE_SIZE
        pages = sequence._pages
        lent = range(first, min(sequence._num_lent, len(pages)))
        stale = [i for i in lent if self._cache.num_users(pages[i]) > 1]
        if stale:
            fresh = self._cache.take(len(stale))
            if stale[0] == first and length % PAGE_SIZE:
                source = pages[first] * PAGE_SIZE
                self._rows.copy(source, fresh[0] * PAGE_SIZE, length % PAGE_SIZE)
            self._cache.release([pages[i] for i in stale])
            for index, page in zip(stale, fresh, strict=True):
                pages[index] = page
            sequence.num_leading = leading_run(pages, min(sequence.num_leading, stale[0]))
        for index in lent:
            self._cache.forget(pages[index])
        sequence._num_lent = min(sequence._num_lent, first)

    def _is_better_shared(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether a sequence should begin with these pages themselves, not a copy of them.

        All who share a beginning read it in place, once for all of them, but gather what each has
        behind it: three times the reading. And a copy takes as much memory again.
        """
        in_place = leading_run(found)
        num_behind = len(sequence._pages) - in_place
        is_scarce = 2 * self._cache.num_available < self._allocator.num_pages
        return is_scarce or in_place > 2 * num_behind

    def _replace(self, sequence: Sequence, first: int, found: list[int]) -> None:
        """The pages `found` go in the place of the sequence's own from page `first` on."""
        self._cache.share(found[first:])
        self._cache.release(sequence._pages[first : len(found)])
        sequence._pages[first : len(found)] = found[first:]
        sequence._num_lent = max(sequence._num_lent, len(found))
        sequence.num_leading = leading_run(sequence._pages)

    def _grow(self, sequence: Sequence, missing: int) -> None:
        """Adds pages: the next ones if they are free, else by moving, else from anywhere."""
        pages = sequence._pages
        self._cache.make_room(missing)
        if sequence.run_start is not None:
            adjacent = self._allocator.take_at(pages[-1] + 1, missing)
            if adjacent is not None:
                pages += adjacent
                sequence.num_leading = len(pages)
                return
        if not self._move(sequence, len(pages) + missing):
            pages += self._allocator.take(missing)
            sequence.num_leading = leading_run(pages, sequence.num_leading)

    def _move(self, sequence: Sequence, num_pages: int) -> bool:
        """Moves a sequence to a run of `num_pages`; False if there is none, or others use it.

        Pages that it leaves in the cache are idle from then on.
        """
        if not self._allocator.has_run(num_pages):
            return False
        if any(self._cache.num_users(page) > 1 for page in sequence._pages[: sequence._num_lent]):
            return False
        run = self._allocator.take(num_pages)
        rows = self.slots(sequence, 0, sequence.length)
        self._rows.copy_scattered(rows, np.arange(rows.size) + run[0] * PAGE_SIZE)
        self._cache.release(sequence._pages)
        sequence._pages, sequence._num_lent = run, 0
        sequence.num_leading = num_pages
        return True
