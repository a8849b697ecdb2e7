"""Rollout of draft revisions: which revision of the draft serves, which one is compared with it.

A revision is a model, named by its fingerprint. Plain values, their JSON form, and what an operator
may do. `outrider.redis.rollout_store` stores them, `orchestrator.replicas.rollout` decides.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from outrider.errors import ConfigError
from outrider.replica import record_fields, text_field

_FINGERPRINT_CHARS = 64
_NAME_CHARS = 12
# Revisions that a record remembers as superseded, and as rolled back. The oldest are dropped.
_MAX_FORMER = 32


def revision_name(model_fingerprint: str) -> str:
    """Name of a draft revision: the first 12 characters of its fingerprint.

    Other names than fingerprints, as of simulated drafts, are kept.
    """
    if len(model_fingerprint) == _FINGERPRINT_CHARS:
        return model_fingerprint[:_NAME_CHARS]
    return model_fingerprint[:_FINGERPRINT_CHARS] or "unknown"


class Role(Enum):
    """Role of a draft revision. Mirrors DraftRole of orchestrator.proto."""

    CURRENT = "current"
    # Compared with the current one, to replace it.
    CANARY = "canary"
    # The former current one, compared with the one that replaced it.
    CONTROL = "control"
    # Will be the next canary.
    WAITING = "waiting"
    SUPERSEDED = "superseded"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True)
class AcceptanceSums:
    """Acceptance rates of the generations of one revision: number, sum, and sum of squares."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, rate: float) -> AcceptanceSums:
        return AcceptanceSums(self.num + 1, self.total + rate, self.squares + rate * rate)

    @property
    def mean(self) -> float:
        return self.total / self.num if self.num else 0.0


@dataclass(frozen=True)
class Rollout:
    """State of a rollout; all orchestrators of a target share it.

    `version`: grows with each change. `trial`: the canary, or the control if `is_promoted`; empty:
    nothing is compared. `decision`: the last change and its reason, for people.
    """

    version: int = 0
    current: str = ""
    trial: str = ""
    is_promoted: bool = False
    superseded: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    decision: str = ""

    def role(self, revision: str) -> Role:
        if revision == self.current:
            return Role.CURRENT
        if revision == self.trial:
            return Role.CONTROL if self.is_promoted else Role.CANARY
        if revision in self.rolled_back:
            return Role.ROLLED_BACK
        return Role.SUPERSEDED if revision in self.superseded else Role.WAITING

    @property
    def revisions(self) -> tuple[str, ...]:
        """All revisions that have a role, the current one first."""
        named = (self.current, self.trial, *self.rolled_back, *self.superseded)
        return tuple(filter(None, named))

    def change(
        self,
        decision: str,
        *,
        current: str,
        trial: str = "",
        is_promoted: bool = False,
        superseded: str = "",
        rolled_back: str = "",
    ) -> Rollout:
        """The next version. `superseded`, `rolled_back`: a revision that becomes so."""
        in_use = {current, trial, ""}
        return Rollout(
            self.version + 1,
            current,
            trial,
            is_promoted,
            _joined(self.superseded, superseded, in_use | {rolled_back}),
            _joined(self.rolled_back, rolled_back, in_use),
            decision,
        )

    def promote(self, revision: str) -> Rollout:
        """By the operator: all generations use the revision; nothing is compared."""
        former = self.current if self.current != revision else ""
        return self.change(
            f"{revision} promoted by the operator", current=revision, superseded=former
        )

    def roll_back(self, revision: str) -> Rollout:
        """By the operator. Raises ConfigError if there is no revision to return to."""
        why = f"{revision} rolled back by the operator"
        if revision != self.current:
            trial = self.trial if revision != self.trial else ""
            return self.change(
                why,
                current=self.current,
                trial=trial,
                is_promoted=self.is_promoted and bool(trial),
                rolled_back=revision,
            )
        if not (self.is_promoted and self.trial):
            raise ConfigError(
                f"{revision} is the current revision, and no former one is compared with it: "
                "promote another revision"
            )
        return self.change(why, current=self.trial, rolled_back=revision)

    def retry(self, revision: str) -> Rollout:
        """By the operator: the revision may be compared again. Raises ConfigError if it may be."""
        if self.role(revision) not in (Role.SUPERSEDED, Role.ROLLED_BACK):
            raise ConfigError(f"{revision} is {self.role(revision).value}, not rolled back")
        return replace(
            self,
            version=self.version + 1,
            superseded=_joined(self.superseded, "", {revision}),
            rolled_back=_joined(self.rolled_back, "", {revision}),
            decision=f"{revision} may be tried again, by the operator",
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, record: bytes) -> Rollout:
        """Unknown fields are ignored. Raises ValueError if the record is malformed."""
        fields = record_fields(record)
        version = fields.get("version")
        if type(version) is not int or not 0 < version < 1 << 53:
            raise ValueError("version: must be an integer in [1, 2^53)")
        return cls(
            version=version,
            current=text_field(fields, "current", ""),
            trial=text_field(fields, "trial", ""),
            is_promoted=fields.get("is_promoted") is True,
            superseded=_texts(fields, "superseded"),
            rolled_back=_texts(fields, "rolled_back"),
            decision=text_field(fields, "decision", ""),
        )


def _joined(former: tuple[str, ...], new: str, left_out: set[str]) -> tuple[str, ...]:
    names = (*(name for name in former if name != new), new)
    return tuple(name for name in names if name and name not in left_out)[-_MAX_FORMER:]


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    values = fields.get(name, [])
    if not isinstance(values, list) or len(values) > _MAX_FORMER:
        raise ValueError(f"{name}: must be a list of at most {_MAX_FORMER} strings")
    return tuple(text_field({name: value}, name, "") for value in values)
