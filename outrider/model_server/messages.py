"""Commands, failures and load statistics that both tiers share, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from outrider.errors import (
    InvalidRequest,
    KVFull,
    KVLost,
    KVNeverFits,
    LeaseLost,
    NonFiniteLogits,
    OutriderError,
    StepOutOfMemory,
)
from outrider.model_server.scheduler import GenerationKey


@dataclass(frozen=True)
class Close:
    """Ends a generation; `keep` caches its KV for the session's next turn."""

    key: GenerationKey
    keep: bool


@dataclass(frozen=True)
class Forget:
    """Frees the cached KV of a session that is not live. `key` names only the stream."""

    key: GenerationKey
    session_id: str


class FailureReason(Enum):
    """Why a generation failed. Each tier's protocol has a number for every reason it uses."""

    # Send the context again. The only reason after which the generation is still open.
    KV_LOST = "kv_lost"
    # No room now, or preempted by a generation that is more urgent or began earlier.
    KV_FULL = "kv_full"
    # No memory for the pass; the next ones are smaller. Reported to orchestrators as KV_FULL.
    OUT_OF_MEMORY = "out_of_memory"
    # Longer than the whole KV budget.
    KV_NEVER = "kv_never"
    BAD_MESSAGE = "bad_message"
    DISPLACED = "displaced"
    INTERNAL = "internal"
    # Like INTERNAL: the model's logits were NaN or infinite.
    NON_FINITE = "non_finite"
    # The replica accepts no new generations; nothing was opened.
    DRAINING = "draining"


_REASONS: tuple[tuple[type[OutriderError], FailureReason], ...] = (
    (KVFull, FailureReason.KV_FULL),
    (StepOutOfMemory, FailureReason.OUT_OF_MEMORY),
    (KVNeverFits, FailureReason.KV_NEVER),
    (KVLost, FailureReason.KV_LOST),
    (LeaseLost, FailureReason.DISPLACED),
    (InvalidRequest, FailureReason.BAD_MESSAGE),
    (NonFiniteLogits, FailureReason.NON_FINITE),
)


def failure_reason(error: Exception) -> FailureReason:
    """The reason that the tiers report for an error; INTERNAL for an error without its own."""
    reasons = (reason for kind, reason in _REASONS if isinstance(error, kind))
    return next(reasons, FailureReason.INTERNAL)


@dataclass(frozen=True)
class Failure:
    key: GenerationKey
    reason: FailureReason
    detail: str


@dataclass(frozen=True)
class ServiceStatistics:
    """Counters since the start and current gauges; names as in the tiers' Load messages."""

    num_open_generations: int = 0
    num_idle_sessions: int = 0
    num_opened_total: int = 0
    num_closed_total: int = 0
    kv_used_tokens: int = 0
    num_prefill_tokens_total: int = 0
    num_prefix_queried_tokens_total: int = 0
    num_prefix_hit_tokens_total: int = 0
