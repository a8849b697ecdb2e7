"""Targets that one draft replica serves: what is learnt from each, and what each was given.

Targets differ in how often they accept a draft token and in the duration of their rounds. Written
on the device thread; the statistics may be read on any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from draft_service.messages import Ids, TargetIdentity, TargetStatistics
from draft_service.tree.acceptance import DraftAcceptance
from draft_service.tree.row_budget import RoundPace
from outrider.runtime.protobuf import unpack_ranges

# Targets without open generations are forgotten beyond this number, the earliest first. Bounds the
# metrics: names come from the orchestrators.
MAX_IDLE_TARGETS = 32


class ServedTarget:
    """One target: its acceptance model, the pace of its rounds, and counts since the start."""

    def __init__(self, identity: TargetIdentity) -> None:
        self.identity = identity
        self._unshared_ids = unpack_ranges(identity.unshared_ids, "unshared_ids")
        self._forbidden_ids: dict[int, Ids] = {}
        self.acceptance = DraftAcceptance()
        self.pace = RoundPace()
        self.num_open = 0
        self.num_waiting = 0
        self.num_run_tokens = 0
        self._num_compared = 0
        self._num_agreed = 0

    def forbidden_ids(self, vocab_size: int) -> Ids | None:
        """Ids below `vocab_size`, of the draft and the target, that are not drafted; int64.

        The same array for the same size. None: all are drafted.
        """
        if not len(self._unshared_ids):
            return None
        if vocab_size not in self._forbidden_ids:
            ids = self._unshared_ids
            self._forbidden_ids[vocab_size] = ids[ids < vocab_size]
        return self._forbidden_ids[vocab_size]

    def observe(self, verified: Sequence[tuple[float, bool]], *, has_supports: bool) -> None:
        """Records a commit; `verified` as in DraftAcceptance.observe."""
        self.acceptance.observe(verified, has_supports=has_supports)
        self._num_compared += len(verified)
        self._num_agreed += sum(is_accepted for _, is_accepted in verified)

    def statistics(self) -> TargetStatistics:
        return TargetStatistics(
            self.identity.name,
            self.identity.model_fingerprint,
            self.num_open,
            self.num_waiting,
            self.num_run_tokens,
            self._num_compared,
            self._num_agreed,
        )


class TargetTable:
    """All targets of one replica, by identity."""

    def __init__(self) -> None:
        self._targets: dict[TargetIdentity, ServedTarget] = {}

    def get(self, identity: TargetIdentity) -> ServedTarget:
        """The target's state; made at its first generation."""
        target = self._targets.get(identity)
        if target is None:
            idle = [known for known, state in self._targets.items() if not state.num_open]
            for known in idle[: max(0, len(idle) + 1 - MAX_IDLE_TARGETS)]:
                del self._targets[known]
            target = self._targets[identity] = ServedTarget(identity)
        return target

    @property
    def active(self) -> list[ServedTarget]:
        """Targets with open generations."""
        return [target for target in self._targets.values() if target.num_open]

    def statistics(self) -> tuple[TargetStatistics, ...]:
        return tuple(target.statistics() for target in list(self._targets.values()))
