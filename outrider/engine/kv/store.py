"""Keys and values of all sequences: paged memory, and who may write where.

Knows lengths, pages and tensors; nothing about models or attention, and of token ids only that the
prefix cache goes by them.

Invariant that the rest relies on: every page of a sequence that an append may still write
(from the page of position `length` on) has that sequence as its only owner. So an append within
`max_len` never allocates and never fails for want of room, and what is shared or cached is never
written. `max_len` grows with the sequence; how its pages are found and placed is in placement.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator
from outrider.engine.kv.placement import Placement
from outrider.engine.kv.prefix_cache import PrefixCache, TokenIds
from outrider.engine.kv.reclaim import Reclaim
from outrider.engine.kv.sequence import Sequence, pages_for
from outrider.engine.kv.tensors import KVRows, LayerLayout
from outrider.errors import KVFull

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
        self._placement = Placement(self._allocator, self._cache, self._rows)

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    def to_free(self, groups: Seq[Collection[Sequence]], error: KVFull) -> list[int] | None:
        """Indices of the groups of sequences to free so that what met `error` has room.

        Earlier groups first, and no more than needed; none where parked sequences are enough. None
        where all groups are not enough. Pages that it shares itself make no room.
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
        """Tokens in reserved pages; a page that several sequences share counts once.

        Pages that are only cached, parked or spare do not count: they are given up when their
        room is wanted. May be read on any thread.
        """
        return self._allocator.num_pinned * PAGE_SIZE

    @property
    def idle_tokens(self) -> int:
        """Tokens in pages that only the prefix cache holds."""
        return self._cache.num_idle * PAGE_SIZE

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def open(self, max_len: int, want_len: int = 0) -> Sequence:
        """An empty sequence with room for `max_len` tokens, which may come to hold `want_len`.

        Raises KVFull, reserving nothing; never where `max_len` is 0.
        """
        if max_len < 0 or max(max_len, want_len) < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        with self._lock:
            sequence = Sequence(self, [])
            sequence.want_len = want_len
            self._placement.reserve(sequence, max_len)
            return self._adopt(sequence)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forgets the tokens from `length` on; the reservation stays.

        Raises KVFull, changing nothing, only if the cut falls inside pages shared with a fork
        (they have to be replaced before they can be written again) and no pages are free.
        """
        with self._lock:
            self._check_alive(sequence)
            if not 0 <= length <= sequence.length:
                raise ValueError(f"cannot truncate {sequence} to {length} tokens")
            self._placement.own_from(sequence, length)
            sequence.length = length

    def extend(self, sequence: Sequence, max_len: int, *, margin: int = 0) -> None:
        """Grows the reservation to `max_len` tokens; `margin` pages must be left to be had.

        Raises KVFull, leaving it as it was.
        """
        with self._lock:
            self._check_alive(sequence)
            self._placement.reserve(sequence, max_len, margin=margin)

    def shrink(self, sequence: Sequence, max_len: int) -> None:
        """Gives back what the reservation has beyond `max_len` tokens, which must hold `length`."""
        with self._lock:
            self._check_alive(sequence)
            if max_len < sequence.length:
                raise ValueError(f"cannot shrink {sequence} to {max_len} tokens")
            self._placement.cut(sequence, pages_for(max_len))
            sequence.max_len = min(sequence.max_len, max_len)
            sequence.want_len = sequence.max_len

    def park(self, sequence: Sequence) -> None:
        """What it holds may be evicted (freed) from now on, and does not count as used."""
        with self._lock:
            self._check_alive(sequence)
            self._placement.park(sequence)

    def unpark(self, sequence: Sequence, want_len: int) -> None:
        """It goes on, and may come to hold `want_len` tokens."""
        with self._lock:
            self._check_alive(sequence)
            self._placement.unpark(sequence)
            sequence.want_len = max(sequence.max_len, want_len)

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
            own = self._placement.take(pages_for(max_len) - num_shared)
            shared = sequence._pages[:num_shared]
            self._allocator.share(shared)
            known = min(sequence.num_leading, num_shared)
            child = self._adopt(Sequence(self, shared + own, known))
            child.max_len = child.want_len = max_len
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
        return self.extend_with_prefix(sequence, sequence.max_len, token_ids)

    def extend_with_prefix(
        self, sequence: Sequence, max_len: int, token_ids: TokenIds, *, margin: int = 0
    ) -> int:
        """As `extend`, then `reuse_prefix`; no room is needed for pages that can be shared.

        Raises KVFull, leaving it as it was.
        """
        with self._lock:
            self._check_alive(sequence)
            max_len = max(max_len, sequence.max_len)
            found = self._cache.match(token_ids)[: max_len // PAGE_SIZE]
            start, stop = sequence.length, len(found) * PAGE_SIZE
            if stop <= start:
                self._placement.reserve(sequence, max_len, margin=margin)
                return 0
            found_on = found[start // PAGE_SIZE :]
            self._cache.share(found_on)  # they are not what makes room
            try:
                is_shared = self._begin_with(sequence, found, max_len, margin)
            except KVFull as error:
                self._cache.release(found_on)
                error.shared_pages = found_on
                raise
            if not is_shared:
                self._cache.release(found_on)
            return stop - start

    def _begin_with(self, sequence: Sequence, found: list[int], max_len: int, margin: int) -> bool:
        """Extends the sequence, with what was found shared or copied; whether it is shared."""
        placement = self._placement
        start, stop = sequence.length, len(found) * PAGE_SIZE
        num_pages, num_reserved = pages_for(max_len), sequence.num_reserved
        missing = max(0, num_pages - num_reserved)
        has_room = not missing or missing + margin <= placement.num_available
        if not has_room or placement.is_better_shared(sequence, found, missing):
            num_freed = min(num_reserved, len(found)) - start // PAGE_SIZE
            num_needed = num_pages - max(num_reserved, len(found))
            placement.check_room(max(0, num_needed - num_freed), margin)
            placement.begin_with(sequence, found)
            sequence.length = stop
            placement.reserve(sequence, max_len)
            return True
        placement.reserve(sequence, max_len, margin=margin)
        rows = np.asarray(found)[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
        self._rows.copy_scattered(rows.reshape(-1)[start:], sequence.slots(start, stop))
        sequence.length = stop
        return False

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
            self._placement.cut(sequence, 0)
            sequence._store = None
            sequence.num_leading = 0

    def compact(self, sequence: Sequence) -> None:
        """Moves a scattered sequence to consecutive pages if it shares none and there are any.

        A scattered history is gathered by every layer at every step; moving it once costs
        about as much as one such step.
        """
        with self._lock:
            self._check_alive(sequence)
            self._placement.compact(sequence)

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
            pinned = [s._pages[: s.num_reserved] for s in self._sequences if not s.is_parked]
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
