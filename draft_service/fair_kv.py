"""Base class of the draft worker: KV pages, shared fairly among the targets.

A target within an equal share of the pages may preempt generations of one beyond its own. So a
target with many generations cannot keep another one out. Device thread only.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from draft_service.messages import Command, Proposed
from draft_service.tree.draft_session import DraftGeneration, DraftRow, DraftSession
from draft_service.tree.targets import ServedTarget, TargetTable
from outrider.engine.kv.sequence import pages_for
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.model_server.worker import GenerationWorker, Reclaimable


class FairKVWorker(GenerationWorker[Command, Proposed, DraftGeneration, DraftRow]):
    """Owns the generations' draft sessions and the targets that they belong to."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._drafting: dict[GenerationKey, DraftSession] = {}
        self._targets = TargetTable()
        # Targets with more than their share, when room was last looked for.
        self._over_share: set[ServedTarget] = set()

    def _reclaims(
        self, live: LiveGeneration[DraftGeneration], *, preempts: bool
    ) -> list[Reclaimable]:
        """Branches go first, a tree at a time: that of the oldest commit first."""
        trees = sorted(self._drafting.values(), key=lambda drafting: drafting.committed_at)
        branches = [Reclaimable(tree.branch_sequences, tree.prune) for tree in trees]
        self._over_share = self._find_over_share(live)
        return [*branches, *super()._reclaims(live, preempts=preempts)]

    def _margin(self, live: LiveGeneration[DraftGeneration], *, preempts: bool) -> int:
        self._over_share = self._find_over_share(live)
        return super()._margin(live, preempts=preempts)

    def _may_preempt(
        self,
        live: LiveGeneration[DraftGeneration],
        other: LiveGeneration[DraftGeneration],
        *,
        preempts: bool,
    ) -> bool:
        is_over = other.state.target in self._over_share
        if is_over != (live.state.target in self._over_share):
            return is_over
        return super()._may_preempt(live, other, preempts=preempts)

    def _find_over_share(self, live: LiveGeneration[DraftGeneration]) -> set[ServedTarget]:
        """Targets with more than an equal share, with the pages that `live` needs now.

        Because those count, a target never becomes preemptible by preempting.
        """
        if len(self._targets.active) < 2:
            return set()
        needed_len = self._drafting[live.state.key].tree.root.last_len
        num_pages = Counter({live.state.target: pages_for(needed_len)})
        for other in self._table.live_sessions():
            if other.has_pages and other is not live:
                num_pages[other.state.target] += pages_for(other.sequence.max_len)
        share = self._engine.store.num_pages / len(num_pages)
        return {target for target, num in num_pages.items() if num > share}
