"""What a generation comes to, for its caller. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.generation.state import Finish, SpeculationCounts
from orchestrator.speculation.gamma import GammaDecision


@dataclass(frozen=True)
class Result:
    """Of the whole generation; times in seconds, bytes both ways.

    `num_interrupted_tokens`: as in `conversation.Turn`.
    """

    finish: Finish
    recorded: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    counts: SpeculationCounts
    num_lookahead_hits: int
    time_to_first_token_s: float
    duration_s: float
    tokens_per_s: float | None
    draft_wire_bytes: int
    target_wire_bytes: int
    target_step_s: float
    verify_s: float
    draft_wait_s: float
    decision: GammaDecision | None
    num_interrupted_tokens: int | None = None
