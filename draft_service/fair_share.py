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


# Tokens by which a target that was idle may be served before the others. The generations of a
# target wait for its pass together and come back together: without a claim from that pause it gets
# less than its share, although it asks for more.
MAX_CLAIM = 64


class FairShare(Generic[Target]):
    """Tokens served to each target that competes with others.

    A target without work keeps its count while the others are served up to `MAX_CLAIM` tokens more;
    after that it starts level with the one that was served least. So a pause between two rounds
    costs no share, and an idle target saves up next to nothing.
    """

    def __init__(self) -> None:
        # Of each target that waited in the last pass, or that has a claim.
        self._served: dict[Target, int] = {}
        # What each target of the current pass had been served before it.
        self._before: dict[Target, int] = {}
        # What the least served of those that waited in the last pass had been served.
        self._level = 0

    def turns(self, targets: Collection[Target]) -> Turns[Target]:
        """Order of service in the next pass among the targets with work."""
        self._before = {target: self._served.get(target, self._level) for target in targets}
        return Turns(self._before)

    def settle(self, num_tokens: Mapping[Target, int], waiting: Collection[Target]) -> None:
        """Records a pass: tokens by target, and which targets have work that did not run."""
        after = {t: num + num_tokens.get(t, 0) for t, num in self._before.items()}
        self._level = min((num for t, num in after.items() if t in waiting), default=0)
        idle = {t: num for t, num in (self._served | after).items() if t not in waiting}
        claims = {
            t: num for t, num in idle.items() if waiting and 0 <= self._level - num <= MAX_CLAIM
        }
        self._served = claims | {t: after[t] for t in waiting}


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
