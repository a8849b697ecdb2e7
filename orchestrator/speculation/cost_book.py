"""What is known of the costs of every replica, each by itself. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from orchestrator.speculation.round_costs import DraftCosts, PairCosts, PairRates, TargetCosts
from outrider.replica import CostReport

# Replicas of a tier that something is known of.
_MAX_SIDES = 256


class CostBook:
    """What is known of every replica, by its endpoint; a generation's `pair` looks at two.

    `target` and `draft` give the last report of the replica at an endpoint; None: of any.
    """

    def __init__(
        self,
        target: Callable[[str | None], CostReport],
        draft: Callable[[str | None], CostReport],
    ) -> None:
        self._reports = target, draft
        self._targets: OrderedDict[str | None, TargetCosts] = OrderedDict()
        self._drafts: OrderedDict[str | None, DraftCosts] = OrderedDict()
        self.shared = PairRates()

    def target(self, endpoint: str | None) -> TargetCosts:
        return _side(self._targets, endpoint, TargetCosts, self._reports[0])

    def draft(self, endpoint: str | None) -> DraftCosts:
        return _side(self._drafts, endpoint, DraftCosts, self._reports[1])

    def pair(self) -> PairCosts:
        """Of a new generation: as of the replicas used last, until it is at some of its own."""
        pair = PairCosts(shared=self.shared)
        pair.target_side = self.target(next(reversed(self._targets), None))
        pair.draft_side = self.draft(next(reversed(self._drafts), None))
        return pair


Side = TypeVar("Side", TargetCosts, DraftCosts)


def _side(
    sides: OrderedDict[str | None, Side],
    endpoint: str | None,
    make: Callable[[Callable[[], CostReport]], Side],
    report: Callable[[str | None], CostReport],
) -> Side:
    """The side of `endpoint`, marked as used last. Keeps a bounded number: addresses change."""
    side = sides.get(endpoint)
    if side is None:
        side = sides[endpoint] = make(lambda: report(endpoint))
    sides.move_to_end(endpoint)
    if len(sides) > _MAX_SIDES:
        sides.popitem(last=False)
    return side
