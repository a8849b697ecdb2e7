"""Cost book: the measured costs of every replica by its address."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from orchestrator.speculation.round_costs import DraftCosts, PairCosts, PairStatistics, TargetCosts
from outrider.replica import CostReport

# Replicas per tier. Addresses change when replicas restart, so the least recently used go.
_MAX_REPLICAS = 256


class CostBook:
    """Costs of all replicas, and the statistics of the pair of models (`shared`).

    `target` and `draft` return the last report of the replica at an address; None: of any replica.
    """

    def __init__(
        self,
        target: Callable[[str | None], CostReport],
        draft: Callable[[str | None], CostReport],
    ) -> None:
        self._reports = target, draft
        self._targets: OrderedDict[str | None, TargetCosts] = OrderedDict()
        self._drafts: OrderedDict[str | None, DraftCosts] = OrderedDict()
        self.shared = PairStatistics()

    def target(self, endpoint: str | None) -> TargetCosts:
        return _costs_at(self._targets, endpoint, TargetCosts, self._reports[0])

    def draft(self, endpoint: str | None) -> DraftCosts:
        return _costs_at(self._drafts, endpoint, DraftCosts, self._reports[1])

    def pair(self) -> PairCosts:
        """Costs of a new generation: those of the replicas used last, until it has its own."""
        target = self.target(next(reversed(self._targets), None))
        draft = self.draft(next(reversed(self._drafts), None))
        return PairCosts(target, draft, self.shared)


Costs = TypeVar("Costs", TargetCosts, DraftCosts)


def _costs_at(
    known: OrderedDict[str | None, Costs],
    endpoint: str | None,
    make: Callable[[Callable[[], CostReport]], Costs],
    report: Callable[[str | None], CostReport],
) -> Costs:
    """The costs at `endpoint`, now the most recently used ones."""
    costs = known.get(endpoint)
    if costs is None:
        costs = known[endpoint] = make(lambda: report(endpoint))
    known.move_to_end(endpoint)
    if len(known) > _MAX_REPLICAS:
        known.popitem(last=False)
    return costs
