"""Cost book: the measured costs of every replica, and the statistics of every draft model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from orchestrator.speculation.round_costs import (
    DraftCosts,
    DraftStatistics,
    PairCosts,
    PairStatistics,
    TargetCosts,
)
from outrider.replica import CostReport

# Replicas per tier. Addresses change when replicas restart, so the least recently used go.
_MAX_REPLICAS = 256
# Draft models. The least recently used go.
_MAX_MODELS = 16


class CostBook:
    """Costs of all replicas, and statistics: of each draft model, and of both tiers (`shared`).

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
        self._models: OrderedDict[str, DraftStatistics] = OrderedDict()
        self.shared = PairStatistics()

    def target(self, endpoint: str | None) -> TargetCosts:
        return _costs_at(self._targets, endpoint, TargetCosts, self._reports[0])

    def draft(self, endpoint: str | None) -> DraftCosts:
        return _costs_at(self._drafts, endpoint, DraftCosts, self._reports[1])

    def model(self, revision: str) -> DraftStatistics:
        """Statistics of the draft model of that revision."""
        statistics = self._models.setdefault(revision, DraftStatistics())
        self._models.move_to_end(revision)
        if len(self._models) > _MAX_MODELS:
            self._models.popitem(last=False)
        return statistics

    def pair(self, revision: str = "") -> PairCosts:
        """Costs of a new generation: those of the replicas used last, until it has its own.

        `revision`: of the draft model that it will use.
        """
        target = self.target(next(reversed(self._targets), None))
        draft = self.draft(next(reversed(self._drafts), None))
        return PairCosts(target, draft, self.shared, self.model(revision))


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
