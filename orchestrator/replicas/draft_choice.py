"""Choice among draft models of different size: all serve, each generation uses the fastest.

The alternative to the rollout, in which one revision replaces another. Nothing is shared between
orchestrators: each has the measurements of its own generations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.rollout import Assignment, DraftRollout
from orchestrator.replicas.target_client import TargetLink
from orchestrator.replicas.tier_drafts import draft_speed, num_replicas
from orchestrator.speculation.acceptance import AcceptanceModel
from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.draft_speed import MAX_GAMMA, DraftSpeed
from outrider.draft_rollout import Role, Rollout
from outrider.redis.rollout_store import RolloutStore
from outrider.settings.draft_canary import DraftCanarySettings


class _AllServe(Rollout):
    """A record in which every revision is current."""

    def role(self, revision: str) -> Role:
        return Role.CURRENT


class FastestDraft(DraftRollout):
    """Assigns generations to the draft revision with the most expected tokens per second.

    The share `draft_canary_share` gets a random one: acceptance and cost of all stay known.
    """

    def __init__(
        self,
        num_replicas: Callable[[], Mapping[str, int]],
        settings: DraftCanarySettings,
        speed: Callable[[str], DraftSpeed | None],
        acceptance: Callable[[str], AcceptanceModel],
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`acceptance`: of a revision's draft tokens, over all generations."""
        super().__init__(num_replicas, settings, draw=draw, speed=speed)
        self.record = _AllServe()
        self._acceptance = acceptance

    def assign(self) -> Assignment:
        """The revision for a generation that starts now."""
        revisions = sorted(name for name, num in self.num_replicas().items() if num)
        if len(revisions) < 2:
            return Assignment("".join(revisions))
        share, drawn = self._settings.draft_canary_share, self._draw()
        if drawn < share:
            return Assignment(revisions[int(drawn / share * len(revisions))], is_compared=True)
        return Assignment(max(revisions, key=self._tokens_per_s))

    def _tokens_per_s(self, revision: str) -> float:
        """Expected with one stream. A revision without measured costs is tried first."""
        speed = self._speed(revision)
        if speed is None:
            return math.inf
        return speed.best_tokens_per_s(self._acceptance(revision).survival(MAX_GAMMA))

    def rank(self, revision: str, assignment: Assignment) -> int:
        """As `DraftRollout.rank`: any other revision while the assigned one has no replica."""
        return 0 if revision == assignment.revision or not assignment.revision else 1

    def observe(self, assignment: Assignment, num_accepted: int, num_rejected: int) -> None:
        """Nothing: the acceptance models have counted each round."""

    async def exchange(self, store: RolloutStore) -> None:
        """Nothing is shared or decided."""


def draft_assignment(
    settings: DraftCanarySettings,
    targets: ReplicaPool[TargetLink],
    drafts: ReplicaPool[DraftLink],
    costs: CostBook,
) -> DraftRollout:
    """What assigns generations to draft revisions, by `draft_choice`."""
    replicas = partial(num_replicas, drafts)
    speed = partial(draft_speed, targets, drafts, lambda: 1 - costs.shared.lookahead_hit_rate)
    if settings.draft_choice == "fastest":
        return FastestDraft(replicas, settings, speed, lambda name: costs.model(name).acceptance)
    return DraftRollout(replicas, settings, speed=speed)
