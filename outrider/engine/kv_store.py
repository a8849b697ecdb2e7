"""Keys and values of all sequences: paged memory, and who may write where.

Knows lengths, pages and tensors; nothing about models, attention or token ids.

Invariant that the rest relies on: every page of a sequence that an append may still write
(from the page of position `length` on) has that sequence as its only owner. So an append
never allocates and never fails for want of room, and what is shared is never written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq

import numpy as np

from outrider.engine.kv_rows import KVRows, LayerLayout
from outrider.engine.pages import PageAllocator

__all__ = ["PAGE_SIZE", "KVStore", "LayerLayout", "Sequence"]

PAGE_SIZE = 16
"""Tokens in a page. Every paged attention kernel takes 16."""


class Sequence:
    """A handle on the cached tokens of one sequence. Made and changed by its KVStore only."""

    __slots__ = ("_num_lent", "_pages", "_store", "length", "max_len", "num_leading")

    def __init__(self, store: KVStore, max_len: int, pages: list[int], num_leading: int) -> None:
        self._store: KVStore | None = store
        self._pages = pages
        self._num_lent = 0
        """Pages from this one on are certainly not shared."""
        self.num_leading = num_leading
        """Pages that follow one another in memory, from the first on."""
        self.length = 0
        self.max_len = max_len

    @property
    def first_row(self) -> int:
        """Row of position 0 in the layers' tensors; num_leading pages follow it in place."""
        return self._pages[0] * PAGE_SIZE

    @property
    def run_start(self) -> int | None:
        """`first_row` if all rows are consecutive, else None."""
        return self.first_row if self.num_leading == len(self._pages) > 0 else None

    def __repr__(self) -> str:
        state = "" if self._store is not None else ", freed"
        return f"Sequence(length={self.length}, max_len={self.max_len}{state})"


class KVStore:
    """Memory for keys and values: per layer, K and V as [num_pages * 16, num_heads, dim].

    The accounting is behind a lock, so admission may run beside a forward pass; but a sequence
    must not be truncated, extended or freed while a forward that appends to it is running.
    """

    def __init__(self, layers: Seq[LayerLayout], num_pages: int) -> None:
        self._allocator = PageAllocator(num_pages)
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
        """Tokens in reserved pages; a page that several sequences share counts once."""
        return (self._allocator.num_pages - self._allocator.num_free) * PAGE_SIZE

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def open(self, max_len: int) -> Sequence:
        """An empty sequence with room for `max_len` tokens. Raises KVFull, reserving nothing."""
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        with self._lock:
            pages = self._allocator.take(_num_pages(max_len))
            return self._adopt(max_len, pages, _num_leading(pages, 1))

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
            missing = _num_pages(max_len) - len(sequence._pages)
            if missing > 0:
                self._grow(sequence, missing)
            sequence.max_len = max(sequence.max_len, max_len)

    def shrink(self, sequence: Sequence, max_len: int) -> None:
        """Gives back what the reservation has beyond `max_len` tokens, which must hold `length`."""
        with self._lock:
            self._check_alive(sequence)
            if max_len < max(1, sequence.length):
                raise ValueError(f"cannot shrink {sequence} to {max_len} tokens")
            num_pages = _num_pages(max_len)
            self._allocator.release(sequence._pages[num_pages:])
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
            own = self._allocator.take(_num_pages(max_len) - num_shared)
            shared = sequence._pages[:num_shared]
            self._allocator.share(shared)
            pages = shared + own
            known = min(sequence.num_leading, num_shared)
            child = self._adopt(max_len, pages, _num_leading(pages, known))
            child._num_lent = num_shared
            sequence._num_lent = max(sequence._num_lent, num_shared)
            if num_copied:
                source = sequence._pages[num_shared] * PAGE_SIZE
                self._rows.copy(source, own[0] * PAGE_SIZE, num_copied)
            child.length = length
            return child

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
            self._copy(self.slots(source, start, length), self.slots(sequence, start, length))
            sequence.length = length

    def free(self, sequence: Sequence) -> None:
        """Gives the reservation back. Raises ValueError for a sequence that is not open here."""
        with self._lock:
            self._check_alive(sequence)
            self._sequences.remove(sequence)
            self._allocator.release(sequence._pages)
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
        if stop <= sequence.num_leading * PAGE_SIZE:
            return np.arange(sequence.first_row + start, sequence.first_row + stop)
        first = start // PAGE_SIZE
        if _num_pages(stop) == first + 1:
            row = sequence._pages[first] * PAGE_SIZE + start % PAGE_SIZE
            return np.arange(row, row + stop - start)
        positions = np.arange(start, stop)
        pages = np.asarray(sequence._pages[first : _num_pages(stop)], dtype=np.int64)
        return pages[positions // PAGE_SIZE - first] * PAGE_SIZE + positions % PAGE_SIZE

    def page_ids(self, sequence: Sequence, num_tokens: int) -> np.ndarray:
        """The pages that hold the first `num_tokens` positions, in order: int32."""
        count = _num_pages(num_tokens)
        leading = min(sequence.num_leading, count)
        run = np.arange(sequence._pages[0], sequence._pages[0] + leading, dtype=np.int32)
        if leading == count:
            return run
        return np.append(run, np.asarray(sequence._pages[leading:count], dtype=np.int32))

    def owns(self, sequence: Sequence) -> bool:
        return sequence._store is self

    def check_integrity(self) -> None:
        """Asserts that pages, owners, reservations and lengths agree."""
        with self._lock:
            self._allocator.check_integrity([s._pages for s in self._sequences])
            for sequence in self._sequences:
                pages = sequence._pages
                assert sequence._store is self, f"{sequence} belongs to another store"
                assert 0 <= sequence.length <= sequence.max_len, f"{sequence} is too long"
                assert _num_pages(sequence.max_len) <= len(pages), f"{sequence}: pages missing"
                assert sequence.num_leading == _num_leading(pages, 1), f"{sequence}: wrong run"
                for page in pages[sequence._num_lent :]:
                    assert not self._allocator.is_shared(page), f"{sequence}: {page} is lent"
                for page in pages[sequence.length // PAGE_SIZE :]:
                    assert not self._allocator.is_shared(page), f"{sequence} may write page {page}"

    def _adopt(self, max_len: int, pages: list[int], num_leading: int) -> Sequence:
        sequence = Sequence(self, max_len, pages, num_leading)
        self._sequences.add(sequence)
        return sequence

    def _check_alive(self, sequence: Sequence) -> None:
        if sequence._store is not self:
            raise ValueError(f"{sequence} is not open in this store")

    def _own_from(self, sequence: Sequence, length: int) -> None:
        """Replaces shared pages from the page of position `length` on (copy-on-write)."""
        first = length // PAGE_SIZE
        pages = sequence._pages
        lent = range(first, min(sequence._num_lent, len(pages)))
        stale = [i for i in lent if self._allocator.is_shared(pages[i])]
        if stale:
            fresh = self._allocator.take(len(stale))
            if stale[0] == first and length % PAGE_SIZE:
                source = pages[first] * PAGE_SIZE
                self._rows.copy(source, fresh[0] * PAGE_SIZE, length % PAGE_SIZE)
            self._allocator.release([pages[i] for i in stale])
            for index, page in zip(stale, fresh, strict=True):
                pages[index] = page
            sequence.num_leading = _num_leading(pages, min(sequence.num_leading, stale[0]))
        sequence._num_lent = min(sequence._num_lent, first)

    def _grow(self, sequence: Sequence, missing: int) -> None:
        """Adds pages: the next ones if they are free, else by moving, else from anywhere."""
        pages = sequence._pages
        if sequence.run_start is not None:
            adjacent = self._allocator.take_at(pages[-1] + 1, missing)
            if adjacent is not None:
                pages += adjacent
                sequence.num_leading = len(pages)
                return
        if not self._move(sequence, len(pages) + missing):
            pages += self._allocator.take(missing)
            sequence.num_leading = _num_leading(pages, sequence.num_leading)

    def _move(self, sequence: Sequence, num_pages: int) -> bool:
        """Moves a sequence without shared pages to a run of `num_pages`; False if it cannot."""
        if any(self._allocator.is_shared(page) for page in sequence._pages[: sequence._num_lent]):
            return False
        sequence._num_lent = 0
        run = self._allocator.take_run(num_pages)
        if run is None:
            return False
        rows = self.slots(sequence, 0, sequence.length)
        self._copy(rows, np.arange(rows.size) + run[0] * PAGE_SIZE)
        self._allocator.release(sequence._pages)
        sequence._pages = run
        sequence.num_leading = num_pages
        return True

    def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies rows in all layers, as many at a time as are consecutive on both sides."""
        jumps = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
        for run in np.split(np.arange(source.size), jumps):
            if run.size:
                self._rows.copy(int(source[run[0]]), int(target[run[0]]), run.size)


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _num_leading(pages: list[int], known: int) -> int:
    """How many pages follow one another from the first on, of which the first `known` do."""
    count = max(known, 1)
    while count < len(pages) and pages[count] == pages[count - 1] + 1:
        count += 1
    return count
