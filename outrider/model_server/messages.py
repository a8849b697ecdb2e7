"""What both tiers are told alike, as plain values, and what both say of their load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from outrider.model_server.scheduler import GenerationKey


@dataclass(frozen=True)
class Close:
    """Ends a generation; `keep` leaves its KV for the session's next turn."""

    key: GenerationKey
    keep: bool


@dataclass(frozen=True)
class Forget:
    """Of a session that is not live, the kept KV may go. `key` names the stream alone."""

    key: GenerationKey
    session_id: str


class FailureReason(Enum):
    """Why a generation failed here; the tiers' protocols have a number for each they use."""

    # Send the context again; the only one after which the generation is still open.
    KV_LOST = "kv_lost"
    # No room now; or its room went to a more urgent one, or to one that began earlier.
    KV_FULL = "kv_full"
    # It is longer than all of the KV budget.
    KV_NEVER = "kv_never"
    BAD_MESSAGE = "bad_message"
    DISPLACED = "displaced"
    INTERNAL = "internal"
    # As internal: the model's logits were NaN or infinite.
    NON_FINITE = "non_finite"
    # The replica takes no new generations now; nothing was opened.
    DRAINING = "draining"


@dataclass(frozen=True)
class Failure:
    key: GenerationKey
    reason: FailureReason
    detail: str


@dataclass(frozen=True)
class ServiceStatistics:
    """Counters since the start and gauges of now; names as in the tiers' Load messages."""

    num_open_generations: int = 0
    num_idle_sessions: int = 0
    num_opened_total: int = 0
    num_closed_total: int = 0
    kv_used_tokens: int = 0
    num_prefill_tokens_total: int = 0
    num_prefix_queried_tokens_total: int = 0
    num_prefix_hit_tokens_total: int = 0
