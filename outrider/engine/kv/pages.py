"""Which pages of the KV memory are free, and how often each of the others is owned and pinned.

An owner that gives its pages up when their room is wanted does not pin them: the prefix cache, a
session between two turns, spare pages of a running one. Knows page numbers only: no tensors, no
sequences, no tokens. It prefers runs of consecutive pages, because attention reads a run in place
and has to gather anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from outrider.errors import KVFull

PAGE_SIZE = 16
"""Tokens in a page. Every paged attention kernel takes 16."""


class PageAllocator:
    """Free runs of pages, and for every page its owners and how many of them pin it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self.num_pinned = 0
        """Pages with an owner that does not give them up."""
        self._num_owners = [0] * num_pages
        self._num_pins = [0] * num_pages
        # A free run [start, end) is in both maps, so that neighbours merge in constant time.
        self._end_of = {0: num_pages} if num_pages else {}
        self._start_of = {num_pages: 0} if num_pages else {}

    def take(self, count: int, most: int = 0) -> list[int]:
        """`count` free pages, pinned; consecutive if there is such a run, and then up to `most`.

        Raises KVFull, taking none.
        """
        if count > self.num_free:
            raise KVFull(f"{count} KV pages needed, {self.num_free} of {self.num_pages} are free")
        run = self._take_run(count, max(count, most))
        if run is not None:
            return run
        pages: list[int] = []
        while len(pages) < count:  # longest runs first: the fewest breaks
            start = max(self._end_of, key=lambda s: (self._end_of[s] - s, -s))
            pages += self._cut(start, min(count - len(pages), self._end_of[start] - start))
        return pages

    def _take_run(self, count: int, most: int) -> list[int] | None:
        """`most` pages of the smallest run that has them, else those of the longest run.

        None where that has fewer than `count`.
        """
        runs = [(end - start, start) for start, end in self._end_of.items()]
        fitting = min((run for run in runs if run[0] >= most), default=None)
        size, start = fitting or max(runs, key=lambda run: (run[0], -run[1]), default=(0, 0))
        return None if size < count else self._cut(start, min(size, most))

    def take_at(self, first: int, count: int, most: int = 0) -> list[int] | None:
        """The pages from `first` on, up to `most`, if at least `count` are free there, or None."""
        size = self._end_of.get(first, first) - first
        return None if size < count else self._cut(first, min(size, max(count, most)))

    def share(self, pages: Iterable[int], *, pinned: bool = True) -> None:
        """One more owner for each of these owned pages."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is shared but has no owner"
            self._num_owners[page] += 1
            if pinned:
                self._pin(page)

    def pin(self, pages: Iterable[int]) -> None:
        """One of each page's owners does not give it up any more."""
        for page in pages:
            self._pin(page)
            assert self._num_pins[page] <= self._num_owners[page], f"page {page}: too many pins"

    def unpin(self, pages: Iterable[int]) -> None:
        """One of each page's owners gives it up if its room is wanted."""
        for page in pages:
            self._unpin(page)

    def release(self, pages: Iterable[int], *, pinned: bool = True) -> list[int]:
        """One owner less for each page; those without are free again, those with one returned."""
        left_with_one: list[int] = []
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is released but has no owner"
            if pinned:
                self._unpin(page)
            self._num_owners[page] = count = self._num_owners[page] - 1
            if count == 0:
                self._add_free(page)
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
        """Asserts that every page is free, or owned and pinned as often as these lists say."""
        owners: Counter[int] = Counter()
        pins = Counter(page for pages in pinned for page in pages)
        assert self.num_pinned == len(pins), "pinned pages are miscounted"
        for page, count in enumerate(self._num_pins):
            assert count == pins[page], f"page {page}: {count} pins counted, there are {pins[page]}"
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
            self._num_owners[page] = self._num_pins[page] = 1
        self.num_free -= count
        self.num_pinned += count
        return pages

    def _add_free(self, page: int) -> None:
        start = self._start_of.pop(page, page)
        end = self._end_of.pop(page + 1, page + 1)
        self._end_of[start] = end
        self._start_of[end] = start
        self.num_free += 1
