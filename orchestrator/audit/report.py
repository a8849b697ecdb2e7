"""Results of the audit so far: counts, and evidence of the last failures. No prompt, no text."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

# Failures that are kept; all are logged.
MAX_FAILURES = 64
OUTCOMES = ("same", "near_tie", "mismatch")
DROP_REASONS = ("queue_full", "busy", "no_target", "failed", "stopping")


@dataclass(frozen=True)
class Failure:
    """A generation whose re-run differs by more than rounding.

    `time`: Unix time. `index`: of the first such token in the context. `gap`: in logits, as in
    `rerun.Divergence`. `token_id` and `expected_id`: None unless the operator allows them.
    """

    time: float
    session_id: str
    client: str
    verification: str
    index: int
    prompt_len: int
    gap: float
    num_divergences: int
    replicas: tuple[str, ...]
    rerun_replica: str
    token_id: int | None = None
    expected_id: int | None = None


@dataclass
class AuditReport:
    """Counts since the start. `max_gap`: greatest gap of a near tie, in logits."""

    generations: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(DROP_REASONS, 0)))
    num_positions: int = 0
    num_near_ties: int = 0
    max_gap: float = 0.0
    failures: deque[Failure] = field(default_factory=lambda: deque(maxlen=MAX_FAILURES))
