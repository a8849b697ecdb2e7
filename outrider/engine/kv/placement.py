"""Where the pages of sequences come from, lie and go: reserved ones, and spare ones behind them.

A sequence reserves pages as it grows. Spare pages follow the reserved ones in memory, so that it
grows in place; they are taken back as soon as another sequence needs room. Room is made of spare
pages first, then of idle pages of the prefix cache. The KV store owns the sequences and the lock.
"""

from __future__ import annotations

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE, PageAllocator
from outrider.engine.kv.prefix_cache import PrefixCache
from outrider.engine.kv.sequence import Sequence, leading_run, pages_for
from outrider.engine.kv.tensors import KVRows
from outrider.errors import KVFull

# A sequence that grows gets as many spare pages as it has, and at least so many.
_LEAST_SPARE = 16


class Placement:
    """Of one KV store. Nothing is changed by a call that raises KVFull."""

    def __init__(self, allocator: PageAllocator, cache: PrefixCache, rows: KVRows) -> None:
        self._allocator = allocator
        self._cache = cache
        self._rows = rows
        self._num_spare = 0
        # Sequences with spare pages.
        self._spare: dict[Sequence, None] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones, spare ones and idle ones."""
        return self._cache.num_available + self._num_spare

    def check_room(self, num_pages: int, margin: int = 0) -> None:
        """Raises KVFull unless so many pages can be had and `margin` are left."""
        if num_pages and num_pages + margin > self.num_available:
            beside = f" beside a margin of {margin}" if margin else ""
            raise KVFull(
                f"{num_pages} KV pages needed{beside}, "
                f"{self.num_available} of {self._allocator.num_pages} are free",
                num_pages + margin,
            )

    def take(self, num_pages: int) -> list[int]:
        """Pinned pages, consecutive if possible."""
        self.check_room(num_pages)
        self._make_room(num_pages)
        return self._allocator.take(num_pages)

    def reserve(self, sequence: Sequence, max_len: int, *, margin: int = 0) -> None:
        """Grows the reservation to `max_len` tokens, if `margin` pages are left to be had then."""
        missing = pages_for(max_len) - sequence.num_reserved
        if missing > 0:
            self.check_room(missing, margin)
            self._use_spare(sequence, missing)
            missing = pages_for(max_len) - sequence.num_reserved
            if missing > 0:
                self._grow(sequence, missing)
        sequence.max_len = max(sequence.max_len, max_len)
        sequence.want_len = max(sequence.want_len, max_len)

    def cut(self, sequence: Sequence, num_pages: int) -> None:
        """Gives back all pages from `num_pages` on."""
        self._drop_spare(sequence, sequence.num_spare)
        self._cache.release(sequence._pages[num_pages:], pinned=not sequence.is_parked)
        del sequence._pages[num_pages:]
        sequence._num_lent = min(sequence._num_lent, num_pages)
        sequence.num_leading = min(sequence.num_leading, num_pages)

    def park(self, sequence: Sequence) -> None:
        """Its pages are not pinned any more; spare ones are given back."""
        self._drop_spare(sequence, sequence.num_spare)
        self._allocator.unpin(sequence._pages)
        sequence.is_parked = True

    def unpark(self, sequence: Sequence) -> None:
        """Its pages are pinned again; always possible."""
        self._allocator.pin(sequence._pages)
        sequence.is_parked = False

    def compact(self, sequence: Sequence) -> None:
        """As KVStore.compact."""
        if sequence.run_start is None:
            self._drop_spare(sequence, sequence.num_spare)
            self._move(sequence, len(sequence._pages), self._num_wanted(sequence))

    def own_from(self, sequence: Sequence, length: int) -> None:
        """Replaces pages that others use from the page of position `length` on (copy-on-write).

        Those that are only cached leave the cache instead: that needs no room.
        """
        first = length // PAGE_SIZE
        pages = sequence._pages
        lent = range(first, min(sequence._num_lent, len(pages)))
        stale = [i for i in lent if self._cache.num_users(pages[i]) > 1]
        if stale:
            fresh = self.take(len(stale))
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

    def is_better_shared(self, sequence: Sequence, found: list[int], num_needed: int) -> bool:
        """Whether a sequence should begin with these pages themselves, not a copy of them.

        All who share a beginning read it in place, once for all of them, but gather what each has
        behind it: three times the reading. And a copy takes as much memory again: `num_needed`
        pages more than are reserved.
        """
        num_left = self.num_available - num_needed
        in_place = leading_run(found)
        num_behind = pages_for(sequence.want_len) - in_place
        return 2 * num_left < self._allocator.num_pages or in_place > 2 * num_behind

    def begin_with(self, sequence: Sequence, found: list[int]) -> None:
        """The pages `found` go in the place of the sequence's own from that of its length on.

        They are pinned for it already. It reserves at least as many tokens afterwards.
        """
        first = sequence.length // PAGE_SIZE
        reserved = sequence._pages[len(found) : sequence.num_reserved]
        self._drop_spare(sequence, sequence.num_spare)
        self._cache.release(sequence._pages[first : len(found)])
        sequence._pages[first:] = found[first:] + reserved
        sequence._num_lent = max(sequence._num_lent, len(found))
        sequence.num_leading = leading_run(sequence._pages)
        sequence.max_len = max(sequence.max_len, len(found) * PAGE_SIZE)
        sequence.want_len = max(sequence.want_len, sequence.max_len)

    def check_integrity(self) -> None:
        """Asserts that spare pages are counted right; for the store, with its lock."""
        assert self._num_spare == sum(s.num_spare for s in self._spare), "spare pages miscounted"
        assert all(s.num_spare > 0 for s in self._spare), "a sequence without spare pages is noted"

    def _make_room(self, num_pages: int) -> None:
        """Until there is a free run of so many pages, or enough."""
        allocator = self._allocator
        while (
            self._spare and allocator.num_free < 2 * num_pages and not allocator.has_run(num_pages)
        ):
            richest = max(self._spare, key=lambda sequence: sequence.num_spare)
            self._drop_spare(richest, -(-richest.num_spare // 2))
        self._cache.make_room(num_pages)

    def _num_wanted(self, sequence: Sequence, missing: int = 0) -> int:
        """Pages that the sequence should have with its spare ones."""
        num_pages = len(sequence._pages) + missing
        most = num_pages + max(_LEAST_SPARE, num_pages)
        return max(num_pages, min(pages_for(sequence.want_len), most))

    def _grow(self, sequence: Sequence, missing: int) -> None:
        """Adds pages: the next ones if they are free, else by moving, else from anywhere."""
        pages = sequence._pages
        wanted = self._num_wanted(sequence, missing)
        if sequence.run_start is not None:
            most = wanted - len(pages)
            adjacent = self._allocator.take_at(pages[-1] + 1, missing, most)
            if adjacent is not None:
                pages += adjacent
                sequence.num_leading = len(pages)
                self._note_spare(sequence, len(adjacent) - missing)
                return
        self._make_room(missing)
        self._cache.make_room(wanted)
        if not self._move(sequence, len(pages) + missing, wanted):
            pages += self._allocator.take(missing)
            sequence.num_leading = leading_run(pages, sequence.num_leading)

    def _move(self, sequence: Sequence, num_pages: int, wanted: int) -> bool:
        """Moves a sequence to a run of `num_pages`, with spare ones up to `wanted`.

        False if there is none, or others use it. Pages that it leaves in the cache are idle then.
        """
        if not self._allocator.has_run(num_pages):
            return False
        if any(self._cache.num_users(page) > 1 for page in sequence._pages[: sequence._num_lent]):
            return False
        run = self._allocator.take(num_pages, wanted)
        if sequence.length:
            rows = sequence.slots(0, sequence.length)
            self._rows.copy_scattered(rows, np.arange(rows.size) + run[0] * PAGE_SIZE)
        self._cache.release(sequence._pages)
        sequence._pages, sequence._num_lent = run, 0
        sequence.num_leading = len(run)
        self._note_spare(sequence, len(run) - num_pages)
        return True

    def _note_spare(self, sequence: Sequence, count: int) -> None:
        """The last `count` pages are spare; none was before."""
        if count:
            self._allocator.unpin(sequence._pages[-count:])
            sequence.num_spare = count
            self._num_spare += count
            self._spare[sequence] = None

    def _use_spare(self, sequence: Sequence, most: int) -> None:
        """Up to so many spare pages are reserved from now on."""
        count = min(sequence.num_spare, most)
        if count:
            first = sequence.num_reserved
            self._allocator.pin(sequence._pages[first : first + count])
            self._forget_spare(sequence, count)

    def _drop_spare(self, sequence: Sequence, count: int) -> None:
        """Gives back the last `count` spare pages."""
        if count:
            self._cache.release(sequence._pages[-count:], pinned=False)
            del sequence._pages[-count:]
            sequence.num_leading = min(sequence.num_leading, len(sequence._pages))
            self._forget_spare(sequence, count)

    def _forget_spare(self, sequence: Sequence, count: int) -> None:
        sequence.num_spare -= count
        self._num_spare -= count
        if not sequence.num_spare:
            del self._spare[sequence]
