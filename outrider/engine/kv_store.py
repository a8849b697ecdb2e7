"""Keys and values of all sequences: paged memory, and who may write where.

Knows lengths, pages and tensors; nothing about models, attention or token ids.

Invariant that the rest relies on: every page of a sequence that an append may still write
(from the page of position `length` on) has that sequence as its only owner. So an append
never allocates and never fails for want of room, and what is shared is never written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from outrider.engine.pages import PageAllocator

PAGE_SIZE = 16
"""Tokens in a page. Every paged attention kernel takes 16."""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What one layer keeps for a token: `num_heads` keys and values, and where."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def empty(self, rows: int, dim: int) -> torch.Tensor:
        return torch.empty(rows, self.num_heads, dim, dtype=self.dtype, device=self.device)


class Sequence:
    """A handle on the cached tokens of one sequence. Made and changed by its KVStore only."""

    __slots__ = ("_pages", "_store", "length", "max_len", "run_start")

    def __init__(self, store: KVStore, max_len: int, pages: list[int]) -> None:
        self._store: KVStore | None = store
        self._pages = pages
        self.run_start = _find_run(pages)
        """Row of position 0 in the layers' tensors if the rows are consecutive, else None."""
        self.length = 0
        self.max_len = max_len

    def __repr__(self) -> str:
        state = "" if self._store is not None else ", freed"
        return f"Sequence(length={self.length}, max_len={self.max_len}{state})"


class KVStore:
    """Memory for keys and values: per layer, K and V as [num_pages, 16, num_heads, dim].

    The accounting is behind a lock, so admission may run beside a forward pass; but a sequence
    must not be truncated, extended or freed while a forward that appends to it is running.
    """

    def __init__(self, layers: Seq[LayerLayout], num_pages: int) -> None:
        self._allocator = PageAllocator(num_pages)
        self._sequences: set[Sequence] = set()
        self._lock = threading.Lock()
        rows = num_pages * PAGE_SIZE
        # torch.empty is committed by the system page by page as it is first written.
        self.keys = [layer.empty(rows, layer.key_dim) for layer in layers]
        self.values = [layer.empty(rows, layer.value_dim) for layer in layers]

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
            return self._adopt(max_len, self._allocator.take(_num_pages(max_len)))

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
            sequence.run_start = _find_run(sequence._pages)

    def fork(self, sequence: Sequence, max_len: int) -> Sequence:
        """A second sequence with the same tokens and room for `max_len`.

        Full pages are shared, the partly filled last one is copied; neither sequence sees what
        the other does from here on. Raises KVFull, changing nothing.
        """
        with self._lock:
            self._check_alive(sequence)
            if max_len < max(1, sequence.length):
                raise ValueError(f"a fork of {sequence} cannot have room for {max_len} tokens")
            num_shared = sequence.length // PAGE_SIZE
            own = self._allocator.take(_num_pages(max_len) - num_shared)
            shared = sequence._pages[:num_shared]
            self._allocator.share(shared)
            child = self._adopt(max_len, shared + own)
            if sequence.length % PAGE_SIZE:
                self._copy_pages(sequence._pages[num_shared : num_shared + 1], own[:1])
            child.length = sequence.length
            return child

    def free(self, sequence: Sequence) -> None:
        """Gives the reservation back. Raises ValueError for a sequence that is not open here."""
        with self._lock:
            self._check_alive(sequence)
            self._sequences.remove(sequence)
            self._allocator.release(sequence._pages)
            sequence._store = None
            sequence._pages = []
            sequence.run_start = None

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
        if sequence.run_start is not None:
            return np.arange(sequence.run_start + start, sequence.run_start + stop)
        positions = np.arange(start, stop)
        pages = np.asarray(sequence._pages, dtype=np.int64)
        return pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

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
                assert sequence.run_start == _find_run(pages), f"{sequence}: wrong run"
                for page in pages[sequence.length // PAGE_SIZE :]:
                    assert not self._allocator.is_shared(page), f"{sequence} may write page {page}"

    def _adopt(self, max_len: int, pages: list[int]) -> Sequence:
        sequence = Sequence(self, max_len, pages)
        self._sequences.add(sequence)
        return sequence

    def _check_alive(self, sequence: Sequence) -> None:
        if sequence._store is not self:
            raise ValueError(f"{sequence} is not open in this store")

    def _own_from(self, sequence: Sequence, length: int) -> None:
        """Replaces shared pages from the page of position `length` on (copy-on-write)."""
        first = length // PAGE_SIZE
        pages = sequence._pages
        stale = [i for i in range(first, len(pages)) if self._allocator.is_shared(pages[i])]
        if not stale:
            return
        fresh = self._allocator.take(len(stale))
        if stale[0] == first and length % PAGE_SIZE:
            self._copy_pages([pages[first]], fresh[:1])
        self._allocator.release([pages[i] for i in stale])
        for index, page in zip(stale, fresh, strict=True):
            pages[index] = page
        sequence.run_start = _find_run(pages)

    def _grow(self, sequence: Sequence, missing: int) -> None:
        """Adds pages: the next ones if they are free, else by moving, else from anywhere."""
        pages = sequence._pages
        if sequence.run_start is not None:
            adjacent = self._allocator.take_at(pages[-1] + 1, missing)
            if adjacent is not None:
                pages += adjacent
                return
        if not self._move(sequence, len(pages) + missing):
            pages += self._allocator.take(missing)
            sequence.run_start = _find_run(pages)

    def _move(self, sequence: Sequence, num_pages: int) -> bool:
        """Moves a sequence without shared pages to a run of `num_pages`; False if it cannot."""
        if any(self._allocator.is_shared(page) for page in sequence._pages):
            return False
        run = self._allocator.take_run(num_pages)
        if run is None:
            return False
        num_filled = _num_pages(sequence.length)
        self._copy_pages(sequence._pages[:num_filled], run[:num_filled])
        self._allocator.release(sequence._pages)
        sequence._pages = run
        sequence.run_start = run[0] * PAGE_SIZE
        return True

    def _copy_pages(self, source: list[int], target: list[int]) -> None:
        for tensor in (*self.keys, *self.values):
            paged = tensor.view(-1, PAGE_SIZE, *tensor.shape[1:])
            index = torch.tensor([source, target], dtype=torch.long, device=tensor.device)
            paged[index[1]] = paged[index[0]]


def _num_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _find_run(pages: list[int]) -> int | None:
    consecutive = pages == list(range(pages[0], pages[0] + len(pages)))
    return pages[0] * PAGE_SIZE if consecutive else None
