"""Page placement: which pages a sequence gets, keeps as spare, shares and gives back.

A sequence reserves pages as it grows. Spare pages follow its reserved ones in memory, so that it
can grow in place. When other sequences need pages, spare pages are taken back first, then idle
pages of the prefix cache are evicted. The KV store owns the sequences and holds the lock.
"""

from __future__ import annotations

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator
from outrider.engine.kv.prefix_cache import PrefixCache
from outrider.engine.kv.sequence import Sequence, leading_run, pages_for
from outrider.engine.kv.tensors import KVRows
from outrider.errors import KVFull

# A growing sequence gets as many spare pages as it has pages, but at least this many.
_MIN_SPARE = 16


class Placement:
    """Page placement of one KV store. A call that raises KVFull changes nothing."""

    def __init__(self, allocator: PageAllocator, cache: PrefixCache, rows: KVRows) -> None:
        self._allocator = allocator
        self._cache = cache
        self._rows = rows
        self._num_spare = 0
        # Sequences with spare pages (a dict as an ordered set).
        self._spare: dict[Sequence, None] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be allocated: free, spare or idle in the prefix cache."""
        return self._cache.num_available + self._num_spare

    def check_available(self, num_pages: int, margin: int = 0) -> None:
        """Raises KVFull unless `num_pages` can be allocated with `margin` more left over."""
        if num_pages and num_pages + margin > self.num_available:
            plus = f" plus a margin of {margin}" if margin else ""
            raise KVFull(
                f"{num_pages} KV pages needed{plus}, "
                f"{self.num_available} of {self._allocator.num_pages} are free",
                num_pages + margin,
            )

    def take(self, num_pages: int) -> list[int]:
        """Allocate `num_pages`, pinned, consecutive if possible. Raises KVFull."""
        self.check_available(num_pages)
        self._reclaim(num_pages)
        return self._allocator.take(num_pages)

    def reserve(self, sequence: Sequence, max_len: int, *, margin: int = 0) -> None:
        """Grow the reservation to `max_len` tokens. KVFull unless `margin` pages are left."""
        missing = pages_for(max_len) - sequence.num_reserved
        if missing > 0:
            self.check_available(missing, margin)
            self._use_spare(sequence, missing)
            missing = pages_for(max_len) - sequence.num_reserved
            if missing > 0:
                self._grow(sequence, missing)
        sequence.max_len = max(sequence.max_len, max_len)
        sequence.expected_len = max(sequence.expected_len, max_len)

    def release_from(self, sequence: Sequence, num_pages: int) -> None:
        """Release all pages from index `num_pages` on, and all spare pages."""
        self._release_spare(sequence, sequence.num_spare)
        self._cache.release(sequence._pages[num_pages:], pinned=not sequence.is_evictable)
        del sequence._pages[num_pages:]
        sequence._num_maybe_shared = min(sequence._num_maybe_shared, num_pages)
        sequence.num_leading = min(sequence.num_leading, num_pages)

    def make_evictable(self, sequence: Sequence) -> None:
        """Unpin the pages of a sequence, so that they do not count as used; release spare ones."""
        self._release_spare(sequence, sequence.num_spare)
        self._allocator.unpin(sequence._pages)
        sequence.is_evictable = True

    def make_active(self, sequence: Sequence) -> None:
        """Pin the pages of an evictable sequence again. Always possible."""
        self._allocator.pin(sequence._pages)
        sequence.is_evictable = False

    def compact(self, sequence: Sequence) -> None:
        """Implements KVStore.compact."""
        if sequence.run_start is None:
            self._release_spare(sequence, sequence.num_spare)
            self._move(sequence, len(sequence._pages), self._num_wanted(sequence))

    def copy_on_write(self, sequence: Sequence, length: int) -> None:
        """Replace pages that others use, from the page of position `length` on, by copies.

        Pages that only the prefix cache uses are removed from the cache instead, which needs no
        pages.
        """
        first = length // PAGE_SIZE
        pages = sequence._pages
        maybe_shared = range(first, min(sequence._num_maybe_shared, len(pages)))
        stale = [i for i in maybe_shared if self._cache.num_users(pages[i]) > 1]
        if stale:
            fresh = self.take(len(stale))
            if stale[0] == first and length % PAGE_SIZE:
                source = pages[first] * PAGE_SIZE
                self._rows.copy(source, fresh[0] * PAGE_SIZE, length % PAGE_SIZE)
            self._cache.release([pages[i] for i in stale])
            for index, page in zip(stale, fresh, strict=True):
                pages[index] = page
            sequence.num_leading = leading_run(pages, min(sequence.num_leading, stale[0]))
        for index in maybe_shared:
            self._cache.forget(pages[index])
        sequence._num_maybe_shared = min(sequence._num_maybe_shared, first)

    def should_share(self, sequence: Sequence, found: list[int], num_needed: int) -> bool:
        """Whether the sequence should share the pages `found` instead of copying them.

        Sequences that share a prefix read it in place, once for all of them, but gather the pages
        behind it: three times the reads. A copy needs `num_needed` more pages than are reserved.
        """
        num_left = self.num_available - num_needed
        in_place = leading_run(found)
        num_after = pages_for(sequence.expected_len) - in_place
        return 2 * num_left < self._allocator.num_pages or in_place > 2 * num_after

    def share_prefix(self, sequence: Sequence, found: list[int]) -> None:
        """Replace the sequence's pages, from that of its length on, by the cached pages `found`.

        `found` are already pinned for it. The sequence reserves at least their tokens afterwards.
        """
        first = sequence.length // PAGE_SIZE
        reserved = sequence._pages[len(found) : sequence.num_reserved]
        self._release_spare(sequence, sequence.num_spare)
        self._cache.release(sequence._pages[first : len(found)])
        sequence._pages[first:] = found[first:] + reserved
        sequence._num_maybe_shared = max(sequence._num_maybe_shared, len(found))
        sequence.num_leading = leading_run(sequence._pages)
        sequence.max_len = max(sequence.max_len, len(found) * PAGE_SIZE)
        sequence.expected_len = max(sequence.expected_len, sequence.max_len)

    def check_integrity(self) -> None:
        """Assert that spare pages are counted correctly. Called by the store, with its lock."""
        assert self._num_spare == sum(s.num_spare for s in self._spare), "spare pages miscounted"
        assert all(s.num_spare > 0 for s in self._spare), "a sequence without spare pages is listed"

    def _reclaim(self, num_pages: int) -> None:
        """Take back spare and idle pages until a run of `num_pages` is free, or twice as many."""
        allocator = self._allocator
        while (
            self._spare and allocator.num_free < 2 * num_pages and not allocator.has_run(num_pages)
        ):
            donor = max(self._spare, key=lambda sequence: sequence.num_spare)
            self._release_spare(donor, -(-donor.num_spare // 2))
        self._cache.reclaim(num_pages)

    def _num_wanted(self, sequence: Sequence, missing: int = 0) -> int:
        """Pages that the sequence should have, including spare ones."""
        num_pages = len(sequence._pages) + missing
        most = num_pages + max(_MIN_SPARE, num_pages)
        return max(num_pages, min(pages_for(sequence.expected_len), most))

    def _grow(self, sequence: Sequence, missing: int) -> None:
        """Add pages: the following ones if free, otherwise by moving, otherwise from anywhere."""
        pages = sequence._pages
        wanted = self._num_wanted(sequence, missing)
        if sequence.run_start is not None:
            most = wanted - len(pages)
            adjacent = self._allocator.take_at(pages[-1] + 1, missing, most)
            if adjacent is not None:
                pages += adjacent
                sequence.num_leading = len(pages)
                self._add_spare(sequence, len(adjacent) - missing)
                return
        self._reclaim(missing)
        self._cache.reclaim(wanted)
        if not self._move(sequence, len(pages) + missing, wanted):
            pages += self._allocator.take(missing)
            sequence.num_leading = leading_run(pages, sequence.num_leading)

    def _move(self, sequence: Sequence, num_pages: int, wanted: int) -> bool:
        """Move a sequence to a run of `num_pages` pages, plus spare ones up to `wanted` in all.

        False if there is no such run or others use its pages. Pages that stay in the prefix cache
        become idle.
        """
        if not self._allocator.has_run(num_pages):
            return False
        if any(
            self._cache.num_users(page) > 1
            for page in sequence._pages[: sequence._num_maybe_shared]
        ):
            return False
        run = self._allocator.take(num_pages, wanted)
        if sequence.length:
            rows = sequence.slots(0, sequence.length)
            self._rows.copy_scattered(rows, np.arange(rows.size) + run[0] * PAGE_SIZE)
        self._cache.release(sequence._pages)
        sequence._pages, sequence._num_maybe_shared = run, 0
        sequence.num_leading = len(run)
        self._add_spare(sequence, len(run) - num_pages)
        return True

    def _add_spare(self, sequence: Sequence, count: int) -> None:
        """Unpin the last `count` pages as spare ones. The sequence had none before."""
        if count:
            self._allocator.unpin(sequence._pages[-count:])
            sequence.num_spare = count
            self._num_spare += count
            self._spare[sequence] = None

    def _use_spare(self, sequence: Sequence, most: int) -> None:
        """Reserve up to `most` of the spare pages."""
        count = min(sequence.num_spare, most)
        if count:
            first = sequence.num_reserved
            self._allocator.pin(sequence._pages[first : first + count])
            self._subtract_spare(sequence, count)

    def _release_spare(self, sequence: Sequence, count: int) -> None:
        """Release the last `count` spare pages."""
        if count:
            self._cache.release(sequence._pages[-count:], pinned=False)
            del sequence._pages[-count:]
            sequence.num_leading = min(sequence.num_leading, len(sequence._pages))
            self._subtract_spare(sequence, count)

    def _subtract_spare(self, sequence: Sequence, count: int) -> None:
        """Count `count` spare pages less."""
        sequence.num_spare -= count
        self._num_spare -= count
        if not sequence.num_spare:
            del self._spare[sequence]
