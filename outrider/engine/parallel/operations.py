"""Operation log: what rank 0 did to KV memory and model, in order, for the other ranks to replay.

Rank 0 owns the allocator, the prefix cache and all sequences. The other ranks need only what
changes tensors: copies of KV rows (forks, copy-on-write, moves) and forward passes with their page
tables. Opening, growing, rolling back and freeing a sequence change no tensor and are not sent.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from outrider.engine.attention.segments import Segment
from outrider.engine.kv.sequence import Sequence
from outrider.engine.kv.store import KVStore
from outrider.engine.kv.tensors import CopyRun, LayerLayout
from outrider.engine.parallel.group import Message, RankGroup
from outrider.errors import InternalError

Ids = npt.NDArray[np.int64]
Lost = Callable[[str], None]

_COPY, _FORWARD = 1, 2


class OperationLog:
    """Sender of the log, on rank 0."""

    def __init__(self, send: Callable[[Message], None], on_lost: Lost) -> None:
        """`on_lost(why)`: ends the replica. After a failed operation the ranks differ."""
        self._send = send
        self._on_lost = on_lost
        self._lock = threading.Lock()

    def copy(self, runs: Seq[CopyRun]) -> None:
        """Send copies of KV rows, before they are made here."""
        with self._ending_replica():
            self._send_values([_COPY], np.array(runs, np.int64).reshape(-1))

    @contextmanager
    def step(self, segments: Seq[Segment], token_ids: Ids, rows: Ids) -> Iterator[None]:
        """Send a forward pass, then run it here in the block."""
        with self._ending_replica():
            head = [_FORWARD, token_ids.size, rows.size, len(segments)]
            self._send_values(head, token_ids, rows, *map(_encoded, segments))
            yield

    def _send_values(self, head: list[int], *parts: Ids) -> None:
        message = np.concatenate([np.array(head, np.int64), *parts])
        with self._lock:
            self._send(message)

    @contextmanager
    def _ending_replica(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = f"an operation failed on rank 0 or on a rank it waits for: {error}"
            self._on_lost(why)
            raise InternalError(why) from error


class ReplayedStore(KVStore):
    """KV rows of a rank other than 0. Rank 0 owns the pages and the sequences."""

    def compact(self, sequence: Sequence) -> None:
        """Does nothing: rank 0 sends its moves as copies."""

    def copy_rows(self, runs: Seq[CopyRun]) -> None:
        """Copy KV rows as rank 0 did."""
        self._rows.copy_runs(runs)


def make_store(
    layers: Seq[LayerLayout], num_pages: int, group: RankGroup, log: OperationLog | None
) -> KVStore:
    """KV memory of this rank."""
    if group.rank:
        return ReplayedStore(layers, num_pages)
    return KVStore(layers, num_pages, None if log is None else log.copy)


class Replay:
    """Receiver of the log, on every other rank."""

    def __init__(
        self,
        store: object,
        copy: Callable[[Seq[CopyRun]], None],
        forward: Callable[[list[Segment], Ids, Ids], object],
    ) -> None:
        """`store` owns the KV rows, `copy` copies some of them, `forward` runs a pass."""
        self._store = store
        self._copy = copy
        self._forward = forward

    def apply(self, message: Message) -> None:
        """Apply one message. Raises what the operation raises."""
        if message[0] == _COPY:
            self._copy([(int(a), int(b), int(n)) for a, b, n in message[1:].reshape(-1, 3)])
            return
        num_tokens, num_rows, num_segments = (int(value) for value in message[1:4])
        token_ids, rows, rest = np.split(message[4:], [num_tokens, num_tokens + num_rows])
        self._forward(self._segments(num_segments, rest), token_ids, rows)

    def _segments(self, count: int, values: Ids) -> list[Segment]:
        segments: list[Segment] = []
        row = 0
        for _ in range(count):
            past, num_tokens, num_runs = (int(value) for value in values[:3])
            runs = values[3 : 3 + 2 * num_runs].reshape(-1, 2).tolist()
            values = values[3 + 2 * num_runs :]
            pages = [page for first, size in runs for page in range(first, first + size)]
            sequence = Sequence(self._store, pages, known=runs[0][1])
            segments.append(Segment(sequence, row, row + num_tokens, past))
            row += num_tokens
        return segments


def _encoded(segment: Segment) -> Ids:
    """Cached tokens, new tokens, number of runs, then (first page, pages) of each run."""
    pages = np.array(segment.sequence._pages, np.int64)
    starts = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist()]
    sizes = np.diff([*starts, pages.size]).tolist()
    runs = zip(pages[starts].tolist(), sizes, strict=True)
    values = [segment.past, segment.stop - segment.start, len(starts)]
    return np.array([*values, *itertools.chain.from_iterable(runs)], np.int64)
