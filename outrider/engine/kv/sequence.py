"""The handle on one sequence's pages, and the arithmetic of pages and tokens.

Owns what a sequence says of itself; who may change it is the KV store's to know. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from outrider.engine.kv.pages import PAGE_SIZE


class Sequence:
    """A handle on the cached tokens of one sequence. Made and changed by its KVStore only."""

    __slots__ = (
        "_num_lent",
        "_pages",
        "_store",
        "is_parked",
        "length",
        "max_len",
        "num_leading",
        "num_spare",
        "want_len",
    )

    def __init__(self, store: object, pages: list[int], known: int = 1) -> None:
        """known: so many of the pages follow one another."""
        self._store: object | None = store
        self._pages = pages
        self._num_lent = 0
        """Pages from this one on are certainly neither shared nor cached."""
        self.num_leading = leading_run(pages, known)
        """Pages that follow one another in memory, from the first on."""
        self.num_spare = 0
        """Of the pages, so many at the end are not reserved: others may take them."""
        self.length = 0
        self.max_len = 0
        """Tokens that are reserved: so many can be appended without fail."""
        self.want_len = 0
        """Tokens that it may come to hold, for which spare pages are of use."""
        self.is_parked = False
        """Evictable: its pages do not count as used."""

    @property
    def num_reserved(self) -> int:
        """Pages that are its own or shared, and not spare."""
        return len(self._pages) - self.num_spare

    @property
    def pinned_pages(self) -> list[int]:
        """Pages that are not given up as long as the sequence is open."""
        return [] if self.is_parked else self._pages[: self.num_reserved]

    @property
    def first_row(self) -> int:
        """Row of position 0 in the layers' tensors; num_leading pages follow it in place."""
        return self._pages[0] * PAGE_SIZE

    @property
    def run_start(self) -> int | None:
        """`first_row` if all rows are consecutive, else None."""
        return self.first_row if self.num_leading == len(self._pages) > 0 else None

    def slots(self, start: int, stop: int) -> np.ndarray:
        """As KVStore.slots."""
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
        """As KVStore.page_ids."""
        count = pages_for(num_tokens)
        if not count:
            return np.empty(0, dtype=np.int32)
        leading = min(self.num_leading, count)
        run = np.arange(self._pages[0], self._pages[0] + leading, dtype=np.int32)
        if leading == count:
            return run
        return np.append(run, np.asarray(self._pages[leading:count], dtype=np.int32))

    def check_integrity(self, num_owners: Callable[[int], int]) -> None:
        """Asserts that lengths and pages agree, and that what may be written is its own."""
        pages = self._pages
        assert 0 <= self.length <= self.max_len <= self.want_len, f"{self} is too long"
        assert pages_for(self.max_len) <= self.num_reserved, f"{self}: pages missing"
        assert not (self.is_parked and self.num_spare), f"{self} is parked with spare pages"
        assert self.num_leading == leading_run(pages), f"{self}: wrong run"
        for page in pages[self._num_lent :]:
            assert num_owners(page) == 1, f"{self}: page {page} is lent"
        for page in pages[self.length // PAGE_SIZE :]:
            assert num_owners(page) == 1, f"{self} may write page {page}"

    def __repr__(self) -> str:
        state = "" if self._store is not None else ", freed"
        return f"Sequence(length={self.length}, max_len={self.max_len}{state})"


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


def leading_run(pages: list[int], known: int = 1) -> int:
    """How many pages follow one another from the first on, of which the first `known` do."""
    count = min(max(known, 1), len(pages))
    while count < len(pages) and pages[count] == pages[count - 1] + 1:
        count += 1
    return count
