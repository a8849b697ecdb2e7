"""Fair shares of a replica among the targets that it drafts for.

Max-min fairness by virtual token counters (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024, arXiv 2401.00588): the target that was served least is next. A target gets all
that it needs up to an equal share; what it leaves is shared by the others. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable, Mapping
from typing import Generic, TypeVar

Target = TypeVar("Target", bound=Hashable)


class FairShare(Generic[Target]):
    """Tokens served to each target while it had to wait for more.

    A target whose work all ran in the last pass has no claim from the past: it starts level with
    the one that was served least of those that waited. So an idle target saves up nothing.
    """

    def __init__(self) -> None:
        self._served: dict[Target, int] = {}
        # What each target of the current pass had been served before it.
        self._before: dict[Target, int] = {}

    def turns(self, targets: Collection[Target]) -> Turns[Target]:
        """Order of service in the next pass among the targets with work."""
        level = min((num for t, num in self._served.items() if t in targets), default=0)
        self._before = {target: self._served.get(target, level) for target in targets}
        return Turns(self._before)

    def settle(self, num_tokens: Mapping[Target, int], waiting: Collection[Target]) -> None:
        """Records a pass: tokens by target, and which targets have work that did not run."""
        before = self._before
        self._served = {t: before.get(t, 0) + num_tokens.get(t, 0) for t in waiting}


class Turns(Generic[Target]):
    """Turns of the targets in one pass: `take` one, and `give_back` it if it has more work."""

    def __init__(self, served: Mapping[Target, int]) -> None:
        # The second number keeps the given order among equals.
        self._heap = [(num, number, t) for number, (t, num) in enumerate(served.items())]
        self._taken: dict[Target, tuple[int, int]] = {}
        heapq.heapify(self._heap)

    def take(self) -> Target | None:
        """The target that was served least; None: none has a turn. It has one if given back."""
        if not self._heap:
            return None
        num_served, number, target = heapq.heappop(self._heap)
        self._taken[target] = (num_served, number)
        return target

    def give_back(self, target: Target, num_tokens: int) -> None:
        """Gives a taken target its next turn, after `num_tokens` more."""
        num_served, number = self._taken.pop(target)
        heapq.heappush(self._heap, (num_served + num_tokens, number, target))
