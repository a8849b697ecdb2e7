"""Page allocator: which KV pages are free; for the others, the number of owners and pins.

A page is freed, and can be allocated again, when `release` removes its last owner. Owners: a
sequence, the prefix cache. An owner does not pin its pages if they may be taken from it: the prefix
cache, the KV of an idle session, spare pages of a running sequence. Runs of consecutive pages are
preferred, because attention reads a run in place and must gather anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from outrider.errors import KVFull

PAGE_SIZE = 16
"""Tokens per page. Every paged attention kernel supports 16."""


class PageAllocator:
    """Free runs of pages; for every other page, its owner count and its pin count."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.num_pinned = 0
        """Pages with at least one pin."""
        self._num_owners = [0] * num_pages
        self._num_pins = [0] * num_pages
        # A free run [start, end) is in both maps, so neighbours merge in constant time.
        self._end_of = {0: num_pages} if num_pages else {}
        self._start_of = {num_pages: 0} if num_pages else {}

    def take(self, count: int, most: int = 0) -> list[int]:
        """Allocate `count` pages, pinned. If one free run has them, up to `most` pages of it.

        Raises KVFull without allocating anything.
        """
        if count > self.num_free:
            raise KVFull(f"{count} KV pages needed, {self.num_free} of {self.num_pages} are free")
        run = self._take_run(count, max(count, most))
        if run is not None:
            return run
        pages: list[int] = []
        while len(pages) < count:  # longest runs first: fewest runs
            start = max(self._end_of, key=lambda s: (self._end_of[s] - s, -s))
            pages += self._take_from_run(
                start, min(count - len(pages), self._end_of[start] - start)
            )
        return pages

    def _take_run(self, count: int, most: int) -> list[int] | None:
        """Allocate `most` pages of the smallest run that has them, otherwise of the longest.

        None if no run has `count` pages.
        """
        runs = [(end - start, start) for start, end in self._end_of.items()]
        fitting = min((run for run in runs if run[0] >= most), default=None)
        size, start = fitting or max(runs, key=lambda run: (run[0], -run[1]), default=(0, 0))
        return None if size < count else self._take_from_run(start, min(size, most))

    def take_at(self, first: int, count: int, most: int = 0) -> list[int] | None:
        """Allocate up to `most` pages from `first` on; None if fewer than `count` are free."""
        size = self._end_of.get(first, first) - first
        return None if size < count else self._take_from_run(first, min(size, max(count, most)))

    def share(self, pages: Iterable[int], *, pinned: bool = True) -> None:
        """Add one owner to each of these pages, which have an owner already."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is shared but has no owner"
            self._num_owners[page] += 1
            if pinned:
                self._pin(page)

    def pin(self, pages: Iterable[int]) -> None:
        """Add one pin to each page: one more of its owners does not give it up."""
        for page in pages:
            self._pin(page)
            assert self._num_pins[page] <= self._num_owners[page], f"page {page}: too many pins"

    def unpin(self, pages: Iterable[int]) -> None:
        """Remove one pin from each page: one of its owners gives it up on demand."""
        for page in pages:
            self._unpin(page)

    def release(self, pages: Iterable[int], *, pinned: bool = True) -> list[int]:
        """Remove one owner from each page; pages without owners are freed.

        Returns the pages that have one owner left.
        """
        left_with_one: list[int] = []
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is released but has no owner"
            if pinned:
                self._unpin(page)
            self._num_owners[page] = count = self._num_owners[page] - 1
            if count == 0:
                self._add_to_free_runs(page)
            elif count == 1:
                left_with_one.append(page)
        return left_with_one

    def _pin(self, page: int) -> None:
        self.num_pinned += not self._num_pins[page]
        self._num_pins[page] += 1

    def _unpin(self, page: int) -> None:
        assert self._num_pins[page] > 0, f"page {page} is not pinned"
        self._num_pins[page] -= 1
        self.num_pinned -= not self._num_pins[page]

    def num_owners(self, page: int) -> int:
        return self._num_owners[page]

    def num_pins(self, page: int) -> int:
        return self._num_pins[page]

    def has_run(self, count: int) -> bool:
        """Whether `count` consecutive pages are free."""
        return any(end - start >= count for start, end in self._end_of.items())

    def check_integrity(self, owned: Iterable[list[int]], pinned: Iterable[list[int]]) -> None:
        """Assert that each page is free, or owned and pinned as often as the lists contain it."""
        owners: Counter[int] = Counter()
        pins = Counter(page for pages in pinned for page in pages)
        assert self.num_pinned == len(pins), "pinned pages are miscounted"
        for page, count in enumerate(self._num_pins):
            assert count == pins[page], f"page {page}: {count} pins counted, there are {pins[page]}"
        for pages in owned:
            assert len(set(pages)) == len(pages), "a sequence owns a page twice"
            owners.update(pages)
        free = [p for start, end in self._end_of.items() for p in range(start, end)]
        assert len(set(free)) == len(free) == self.num_free, "free runs overlap or are miscounted"
        assert self._start_of == {end: start for start, end in self._end_of.items()}
        assert not any(end in self._end_of for end in self._start_of), "neighbours not merged"
        assert owners.keys().isdisjoint(free), "a page is both free and owned"
        assert len(owners) + len(free) == self.num_pages, "a page is neither free nor owned"
        for page, count in enumerate(self._num_owners):
            assert count == owners[page], f"page {page}: {count} counted, {owners[page]} own it"

    def _take_from_run(self, start: int, count: int) -> list[int]:
        """Allocate the first `count` pages of the free run that begins at `start`."""
        if count == 0:
            return []
        end = self._end_of.pop(start)
        if start + count < end:
            self._end_of[start + count] = end
            self._start_of[end] = start + count
        else:
            del self._start_of[end]
        pages = list(range(start, start + count))
        for page in pages:
            self._num_owners[page] = self._num_pins[page] = 1
        self.num_free -= count
        self.num_pinned += count
        return pages

    def _add_to_free_runs(self, page: int) -> None:
        """Mark a freed page as free; merge it with neighbouring free runs."""
        start = self._start_of.pop(page, page)
        end = self._end_of.pop(page + 1, page + 1)
        self._end_of[start] = end
        self._start_of[end] = start
        self.num_free += 1
