"""Which pages of the KV memory are free, and how often each of the others is owned.

Knows page numbers only: no tensors, no sequences, no tokens. It prefers runs of consecutive
pages, because attention reads a run in place and has to gather anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from outrider.errors import KVFull

PAGE_SIZE = 16
"""Tokens in a page. Every paged attention kernel takes 16."""


class PageAllocator:
    """Free runs of pages, and a reference count for every page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._num_owners = [0] * num_pages
        # A free run [start, end) is in both maps, so that neighbours merge in constant time.
        self._end_of = {0: num_pages} if num_pages else {}
        self._start_of = {num_pages: 0} if num_pages else {}

    def take(self, count: int) -> list[int]:
        """`count` free pages, consecutive if there is such a run. Raises KVFull, taking none."""
        if count > self.num_free:
            raise KVFull(f"{count} KV pages needed, {self.num_free} of {self.num_pages} are free")
        run = self._take_run(count)
        if run is not None:
            return run
        pages: list[int] = []
        while len(pages) < count:  # longest runs first: the fewest breaks
            start = max(self._end_of, key=lambda s: (self._end_of[s] - s, -s))
            pages += self._cut(start, min(count - len(pages), self._end_of[start] - start))
        return pages

    def _take_run(self, count: int) -> list[int] | None:
        """`count` consecutive pages from the smallest run that holds them, or None."""
        fitting = ((end - start, start) for start, end in self._end_of.items())
        best = min((run for run in fitting if run[0] >= count), default=None)
        return None if best is None else self._cut(best[1], count)

    def take_at(self, first: int, count: int) -> list[int] | None:
        """The pages [first, first + count) if a free run begins exactly there, or None."""
        if self._end_of.get(first, first) - first < count:
            return None
        return self._cut(first, count)

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of these owned pages."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is shared but has no owner"
            self._num_owners[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """One owner less for each page; those without are free again, those with one returned."""
        left_with_one: list[int] = []
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is released but has no owner"
            self._num_owners[page] = count = self._num_owners[page] - 1
            if count == 0:
                self._add_free(page)
            elif count == 1:
                left_with_one.append(page)
        return left_with_one

    def num_owners(self, page: int) -> int:
        return self._num_owners[page]

    def has_run(self, count: int) -> bool:
        """Whether `count` consecutive pages are free."""
        return any(end - start >= count for start, end in self._end_of.items())

    def check_integrity(self, owned: Iterable[list[int]]) -> None:
        """Asserts that every page is free or owned as often as the page lists `owned` say."""
        owners: Counter[int] = Counter()
        for pages in owned:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            owners.update(pages)
        free = [p for start, end in self._end_of.items() for p in range(start, end)]
        assert len(set(free)) == len(free) == self.num_free, "free runs overlap or are miscounted"
        assert self._start_of == {end: start for start, end in self._end_of.items()}
        assert not any(end in self._end_of for end in self._start_of), "neighbours not merged"
        assert owners.keys().isdisjoint(free), "a page is both free and owned"
        assert len(owners) + len(free) == self.num_pages, "a page is neither free nor owned"
        for page, count in enumerate(self._num_owners):
            assert count == owners[page], f"page {page}: {count} counted, {owners[page]} own it"

    def _cut(self, start: int, count: int) -> list[int]:
        """Takes the first `count` pages of the free run that begins at `start`."""
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
            self._num_owners[page] = 1
        self.num_free -= count
        return pages

    def _add_free(self, page: int) -> None:
        start = self._start_of.pop(page, page)
        end = self._end_of.pop(page + 1, page + 1)
        self._end_of[start] = end
        self._start_of[end] = start
        self.num_free += 1
