"""Queues of a draft replica: generations that wait for draft tokens, and those to draft ahead for.

Both are shared fairly among the targets. Of one target, the generation that has waited longest is
first, and the most likely extension of all its trees. Device thread only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence

from draft_service.fair_share import FairShare
from draft_service.tree.block import Extension
from draft_service.tree.draft_session import DraftRow, DraftSession
from draft_service.tree.row_budget import best_extensions
from draft_service.tree.targets import ServedTarget
from outrider.model_server.scheduler import GenerationKey


class WorkQueues:
    """Generations with work. `max_cost`: tokens of a pass, the most that a row counts in turns."""

    def __init__(self, max_cost: int) -> None:
        self._max_cost = max_cost
        # Generations whose root block is incomplete, in the order in which they began to wait.
        self._needed: dict[GenerationKey, DraftSession] = {}
        # Generations that may have something to draft ahead.
        self._ahead: dict[GenerationKey, DraftSession] = {}
        self._needed_share: FairShare[ServedTarget] = FairShare()
        self._ahead_share: FairShare[Hashable] = FairShare()

    def __bool__(self) -> bool:
        return bool(self._needed or self._ahead)

    @property
    def num_needed(self) -> int:
        return len(self._needed)

    def keys(self) -> list[GenerationKey]:
        return list({**self._needed, **self._ahead})

    def update(self, drafting: DraftSession) -> None:
        """Updates both queues after a change. A generation already queued keeps its place."""
        key = drafting.key
        if not drafting.tree.is_needed:
            self._drop_needed(key)
        elif key not in self._needed:
            self._needed[key] = drafting
            drafting.target.num_waiting += 1
        self._ahead[key] = drafting

    def remove(self, key: GenerationKey) -> None:
        self._drop_needed(key)
        self._ahead.pop(key, None)

    def _drop_needed(self, key: GenerationKey) -> None:
        if (drafting := self._needed.pop(key, None)) is not None:
            drafting.target.num_waiting -= 1

    def drop_ahead(self, key: GenerationKey) -> None:
        """Nothing is drafted ahead for the generation until something changes."""
        self._ahead.pop(key, None)

    def clear_ahead(self) -> None:
        self._ahead.clear()

    def needed(self, num: int) -> list[DraftRow]:
        """The needed rows of up to `num` generations, the targets in turn."""
        queues: dict[ServedTarget, deque[DraftRow]] = {}
        for drafting in self._needed.values():
            row = DraftRow(drafting, drafting.tree.root)
            queues.setdefault(drafting.target, deque()).append(row)
        turns = self._needed_share.turns(queues)
        rows: list[DraftRow] = []
        while len(rows) < num and (target := turns.take()) is not None:
            rows.append(row := queues[target].popleft())
            if queues[target]:
                turns.give_back(target, min(row.num_pending, self._max_cost))
        return rows

    def ahead(self, num: int) -> Iterator[tuple[DraftSession, Extension]]:
        """Up to `num` extensions to draft ahead; as `best_extensions`."""
        return best_extensions(self._ahead, num, self._ahead_share)

    def settle(self, ran: Sequence[tuple[DraftRow, int]]) -> None:
        """Records a pass before it runs: its rows with the number of tokens of each."""
        num_tokens: Counter[ServedTarget] = Counter()
        done: set[GenerationKey] = set()
        for row, num in ran:
            row.drafting.target.num_run_tokens += num
            if row.block is row.drafting.tree.root and row.key in self._needed:
                num_tokens[row.drafting.target] += num
                if num == row.num_pending:
                    done.add(row.key)
        waiting = {d.target for key, d in self._needed.items() if key not in done}
        self._needed_share.settle(num_tokens, waiting)
