"""Sequence: the handle on the pages of one sequence, and arithmetic of pages and tokens.

Only the KV store changes a sequence; see `store.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE


class Sequence:
    """Handle on the cached tokens of one sequence. Created and changed by its KVStore only."""

    __slots__ = (
        "_num_maybe_shared",
        "_pages",
        "_store",
        "expected_len",
        "is_evictable",
        "length",
        "max_len",
        "num_leading",
        "num_spare",
    )

    def __init__(self, store: object, pages: list[int], known: int = 1) -> None:
        """`known`: this many of the first pages are known to be consecutive."""
        self._store: object | None = store
        self._pages = pages
        self._num_maybe_shared = 0
        """Pages from this index on are neither shared nor cached; earlier ones may be."""
        self.num_leading = leading_run(pages, known)
        """Number of consecutive pages from the first on."""
        self.num_spare = 0
        """This many pages at the end are not reserved: other sequences may take them."""
        self.length = 0
        self.max_len = 0
        """Reserved tokens: appends up to this length never fail."""
        self.expected_len = 0
        """Length the sequence may grow to; spare pages are useful up to it."""
        self.is_evictable = False
        """Whether the sequence may be evicted; its pages then do not count as used."""

    @property
    def num_reserved(self) -> int:
        """Pages that are not spare (own or shared)."""
        return len(self._pages) - self.num_spare

    @property
    def pinned_pages(self) -> list[int]:
        """Pages that cannot be taken while the sequence is open."""
        return [] if self.is_evictable else self._pages[: self.num_reserved]

    @property
    def first_row(self) -> int:
        """Row of position 0 in the layers' tensors; `num_leading` pages follow in place."""
        return self._pages[0] * PAGE_SIZE

    @property
    def run_start(self) -> int | None:
        """`first_row` if all rows are consecutive, otherwise None."""
        return self.first_row if self.num_leading == len(self._pages) > 0 else None

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Implements KVStore.slots."""
        if 0 < stop <= self.num_leading * PAGE_SIZE:
            return np.arange(self.first_row + start, self.first_row + stop)
        first = start // PAGE_SIZE
        if pages_for(stop) == first + 1:
            row = self._pages[first] * PAGE_SIZE + start % PAGE_SIZE
            return np.arange(row, row + stop - start)
        positions = np.arange(start, stop)
        pages = np.asarray(self._pages[first : pages_for(stop)], dtype=np.int64)
        return pages[positions // PAGE_SIZE - first] * PAGE_SIZE + positions % PAGE_SIZE

    def page_ids(self, num_tokens: int) -> np.ndarray:
        """Implements KVStore.page_ids."""
        count = pages_for(num_tokens)
        if not count:
            return np.empty(0, dtype=np.int32)
        leading = min(self.num_leading, count)
        run = np.arange(self._pages[0], self._pages[0] + leading, dtype=np.int32)
        if leading == count:
            return run
        return np.append(run, np.asarray(self._pages[leading:count], dtype=np.int32))

    def check_integrity(self, num_owners: Callable[[int], int]) -> None:
        """Assert that lengths and pages agree, and that writable pages have no other owner."""
        pages = self._pages
        assert 0 <= self.length <= self.max_len <= self.expected_len, f"{self} is too long"
        assert pages_for(self.max_len) <= self.num_reserved, f"{self}: pages missing"
        assert not (self.is_evictable and self.num_spare), f"{self} is evictable with spare pages"
        assert self.num_leading == leading_run(pages), f"{self}: wrong run"
        for page in pages[self._num_maybe_shared :]:
            assert num_owners(page) == 1, f"{self}: page {page} is shared"
        for page in pages[self.length // PAGE_SIZE :]:
            assert num_owners(page) == 1, f"{self} may write page {page}"

    def __repr__(self) -> str:
        state = "" if self._store is not None else ", freed"
        return f"Sequence(length={self.length}, max_len={self.max_len}{state})"


def pages_for(num_tokens: int) -> int:
    """Pages needed for `num_tokens`."""
    return -(-num_tokens // PAGE_SIZE)


def leading_run(pages: list[int], known: int = 1) -> int:
    """Number of consecutive pages from the first on; the first `known` are known to be."""
    count = min(max(known, 1), len(pages))
    while count < len(pages) and pages[count] == pages[count - 1] + 1:
        count += 1
    return count
