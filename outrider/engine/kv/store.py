"""KV store: paged memory for the keys and values of all sequences.

Invariant: every page of a sequence that an append may still write (from the page of position
`length` on) has that sequence as its only owner. So an append within `max_len` never allocates and
never fails for lack of pages, and shared or cached pages are never written. How `max_len` grows and
which pages are used is in `placement.py`; pages are freed in `pages.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator
from outrider.engine.kv.placement import Placement
from outrider.engine.kv.prefix_cache import PrefixCache, TokenIds
from outrider.engine.kv.reclaim import Reclaim
from outrider.engine.kv.sequence import Sequence, pages_for
from outrider.engine.kv.tensors import CopyRun, KVRows, LayerLayout
from outrider.errors import KVFull

__all__ = ["PAGE_SIZE", "KVStore", "LayerLayout", "Sequence"]


class KVStore:
    """Memory for keys and values: per layer, K and V as [num_pages * 16, num_heads, dim].

    The accounting is behind a lock, so admission may run during a forward pass. But a sequence must
    not be truncated, extended or freed while a forward pass that appends to it is running.
    """

    def __init__(
        self,
        layers: Seq[LayerLayout],
        num_pages: int,
        on_copy: Callable[[Seq[CopyRun]], None] | None = None,
    ) -> None:
        self._allocator = PageAllocator(num_pages)
        self._cache = PrefixCache(self._allocator)
        self._sequences: set[Sequence] = set()
        self._lock = threading.Lock()
        self.scratch_page = num_pages
        """Page that belongs to no sequence: padding rows of a batch may be written to it."""
        self._rows = KVRows(layers, (num_pages + 1) * PAGE_SIZE, on_copy)
        self.keys, self.values = self._rows.keys, self._rows.values
        self._placement = Placement(self._allocator, self._cache, self._rows)

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    def choose_victims(self, groups: Seq[Collection[Sequence]], error: KVFull) -> list[int] | None:
        """Indices of the groups of sequences to free so that the request that raised `error` fits.

        Earlier groups come first, and no more than needed; empty if evicting evictable sequences is
        enough. None if freeing all groups is not enough. Pages the request would share do not
        count.
        """
        with self._lock:
            allocator, shared = self._allocator, error.shared_pages
            num_unpinned = allocator.num_pages - allocator.num_pinned
            num_unpinned -= sum(not allocator.num_pins(page) for page in shared)
            reclaim = Reclaim(allocator.num_pins, shared)
            return reclaim.choose(groups, error.num_pages - num_unpinned)

    @property
    def capacity_tokens(self) -> int:
        return self._allocator.num_pages * PAGE_SIZE

    @property
    def used_tokens(self) -> int:
        """Tokens in reserved pages; a page shared by several sequences counts once.

        Cached, evictable and spare pages do not count: they can be reused. Read on any thread.
        """
        return self._allocator.num_pinned * PAGE_SIZE

    @property
    def idle_tokens(self) -> int:
        """Tokens in pages that only the prefix cache owns."""
        return self._cache.num_idle * PAGE_SIZE

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def open(self, max_len: int, expected_len: int = 0) -> Sequence:
        """Open an empty sequence with `max_len` tokens reserved, which may grow to `expected_len`.

        Raises KVFull, reserving nothing; never if `max_len` is 0.
        """
        if max_len < 0 or max(max_len, expected_len) < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        with self._lock:
            sequence = Sequence(self, [])
            sequence.expected_len = expected_len
            self._placement.reserve(sequence, max_len)
            return self._adopt(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Roll a sequence back to `length` tokens; the reservation stays.

        Raises KVFull, changing nothing, only if the new end is inside pages shared with a fork and
        no pages are free: those pages must be copied before they can be written.
        """
        with self._lock:
            self._check_alive(sequence)
            if not 0 <= length <= sequence.length:
                raise ValueError(f"cannot truncate {sequence} to {length} tokens")
            self._placement.copy_on_write(sequence, length)
            sequence.length = length

    def extend(self, sequence: Sequence, max_len: int, *, margin: int = 0) -> None:
        """Grow the reservation to `max_len` tokens, if `margin` pages are left then.

        Raises KVFull, changing nothing.
        """
        with self._lock:
            self._check_alive(sequence)
            self._placement.reserve(sequence, max_len, margin=margin)

    def shrink(self, sequence: Sequence, max_len: int) -> None:
        """Release the reservation beyond `max_len` tokens; `max_len` must be at least `length`."""
        with self._lock:
            self._check_alive(sequence)
            if max_len < sequence.length:
                raise ValueError(f"cannot shrink {sequence} to {max_len} tokens")
            self._placement.release_from(sequence, pages_for(max_len))
            sequence.max_len = min(sequence.max_len, max_len)
            sequence.expected_len = sequence.max_len

    def make_evictable(self, sequence: Sequence) -> None:
        """Mark a sequence as evictable: from now on its pages do not count as used."""
        with self._lock:
            self._check_alive(sequence)
            self._placement.make_evictable(sequence)

    def make_active(self, sequence: Sequence, expected_len: int) -> None:
        """Take an evictable sequence into use again; it may grow to `expected_len` tokens."""
        with self._lock:
            self._check_alive(sequence)
            self._placement.make_active(sequence)
            sequence.expected_len = max(sequence.max_len, expected_len)

    def fork(self, sequence: Sequence, max_len: int, length: int | None = None) -> Sequence:
        """A new sequence with the first `length` tokens (None: all) and `max_len` tokens reserved.

        Full pages are shared and a partly filled last page is copied. Later writes to one sequence
        are not seen by the other. Raises KVFull, changing nothing.
        """
        with self._lock:
            self._check_alive(sequence)
            length = sequence.length if length is None else length
            if not 0 <= length <= sequence.length:
                raise ValueError(f"cannot fork {sequence} at {length} tokens")
            if max_len < max(1, length):
                raise ValueError(f"a fork of {sequence} cannot have room for {max_len} tokens")
            num_shared, num_copied = divmod(length, PAGE_SIZE)
            own = self._placement.take(pages_for(max_len) - num_shared)
            shared = sequence._pages[:num_shared]
            self._allocator.share(shared)
            known = min(sequence.num_leading, num_shared)
            child = self._adopt(Sequence(self, shared + own, known))
            child.max_len = child.expected_len = max_len
            child._num_maybe_shared = num_shared
            sequence._num_maybe_shared = max(sequence._num_maybe_shared, num_shared)
            if num_copied:
                source = sequence._pages[num_shared] * PAGE_SIZE
                self._rows.copy(source, own[0] * PAGE_SIZE, num_copied)
            child.length = length
            return child

    def cache_prefix(self, sequence: Sequence, token_ids: TokenIds) -> None:
        """Add the full pages of `sequence`, which begins with `token_ids`, to the prefix cache."""
        with self._lock:
            self._check_alive(sequence)
            num_full = min(len(token_ids), sequence.length) // PAGE_SIZE
            pages = sequence._pages[:num_full]
            self._cache.insert(token_ids[: num_full * PAGE_SIZE], pages)
            sequence._num_maybe_shared = max(sequence._num_maybe_shared, num_full)

    def touch_prefix(self, token_ids: TokenIds) -> None:
        """Mark the cached prefix of the tokens as just used, so that it is evicted last."""
        with self._lock:
            self._cache.match(token_ids)

    def forget_prefix(self, token_ids: TokenIds) -> None:
        """Remove the first page of the tokens, and all that continue it, from the prefix cache."""
        with self._lock:
            for page in self._cache.match(token_ids)[:1]:
                self._cache.forget(page)

    def reuse_prefix(self, sequence: Sequence, token_ids: TokenIds) -> int:
        """Extend `sequence`, which holds the first of `token_ids`, by what is cached of the rest.

        Whole pages only. Returns the number of tokens added. Needs no pages, so it never raises
        KVFull.
        """
        return self.extend_with_prefix(sequence, sequence.max_len, token_ids)

    def extend_with_prefix(
        self, sequence: Sequence, max_len: int, token_ids: TokenIds, *, margin: int = 0
    ) -> int:
        """`extend`, then `reuse_prefix`; pages that can be shared need not be free.

        Raises KVFull, changing nothing.
        """
        with self._lock:
            self._check_alive(sequence)
            max_len = max(max_len, sequence.max_len)
            found = self._cache.match(token_ids)[: max_len // PAGE_SIZE]
            start, stop = sequence.length, len(found) * PAGE_SIZE
            if stop <= start:
                self._placement.reserve(sequence, max_len, margin=margin)
                return 0
            found_after = found[start // PAGE_SIZE :]
            self._cache.share(found_after)  # so that they are not evicted to make the reservation
            try:
                is_shared = self._extend_with_found(sequence, found, max_len, margin)
            except KVFull as error:
                self._cache.release(found_after)
                error.shared_pages = found_after
                raise
            if not is_shared:
                self._cache.release(found_after)
            return stop - start

    def _extend_with_found(
        self, sequence: Sequence, found: list[int], max_len: int, margin: int
    ) -> bool:
        """Extend the sequence, sharing or copying the cached pages. True if they are shared."""
        placement = self._placement
        start, stop = sequence.length, len(found) * PAGE_SIZE
        num_pages, num_reserved = pages_for(max_len), sequence.num_reserved
        missing = max(0, num_pages - num_reserved)
        has_room = not missing or missing + margin <= placement.num_available
        if not has_room or placement.should_share(sequence, found, missing):
            num_freed = min(num_reserved, len(found)) - start // PAGE_SIZE
            num_needed = num_pages - max(num_reserved, len(found))
            placement.check_available(max(0, num_needed - num_freed), margin)
            placement.share_prefix(sequence, found)
            sequence.length = stop
            placement.reserve(sequence, max_len)
            return True
        placement.reserve(sequence, max_len, margin=margin)
        rows = np.asarray(found)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
        self._rows.copy_scattered(rows.reshape(-1)[start:], sequence.slots(start, stop))
        sequence.length = stop
        return False

    def append_copy(self, sequence: Sequence, source: Sequence, length: int) -> None:
        """Append a copy of positions [sequence.length, length) of `source` to `sequence`.

        Raises ValueError if `source` is too short or the reservation of `sequence` too small.
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
        """Release all pages of a sequence. Raises ValueError if it is not open in this store."""
        with self._lock:
            self._check_alive(sequence)
            self._sequences.remove(sequence)
            self._placement.release_from(sequence, 0)
            sequence._store = None
            sequence.num_leading = 0

    def compact(self, sequence: Sequence) -> None:
        """Move a scattered sequence to consecutive pages if it shares none and such pages are free.

        Every layer gathers a scattered history at every step; moving it once costs about as much as
        one such step.
        """
        with self._lock:
            self._check_alive(sequence)
            self._placement.compact(sequence)

    def slots(self, sequence: Sequence, start: int, stop: int) -> np.ndarray:
        """Rows of the layers' tensors for positions [start, stop): int64 [stop - start]."""
        return sequence.slots(start, stop)

    def page_ids(self, sequence: Sequence, num_tokens: int) -> np.ndarray:
        """Pages of the first `num_tokens` positions, in order: int32."""
        return sequence.page_ids(num_tokens)

    def owns(self, sequence: Sequence) -> bool:
        return sequence._store is self

    def check_integrity(self) -> None:
        """Assert that pages, owners, reservations and lengths agree."""
        with self._lock:
            owned = [sequence._pages for sequence in self._sequences]
            pinned = [s._pages[: s.num_reserved] for s in self._sequences if not s.is_evictable]
            self._allocator.check_integrity([*owned, self._cache.pages], pinned)
            self._cache.check_integrity()
            self._placement.check_integrity()
            for sequence in self._sequences:
                assert sequence._store is self, f"{sequence} belongs to another store"
                sequence.check_integrity(self._allocator.num_owners)

    def _adopt(self, sequence: Sequence) -> Sequence:
        self._sequences.add(sequence)
        return sequence

    def _check_alive(self, sequence: Sequence) -> None:
        if sequence._store is not self:
            raise ValueError(f"{sequence} is not open in this store")
