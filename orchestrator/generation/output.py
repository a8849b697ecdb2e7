"""Output of a generation for its transport: chunks of tokens; the last one has the result."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.generation.counts import SpeculationCounts
from orchestrator.generation.state import Commitment, EmittedToken, Finish
from orchestrator.speculation.gamma import GammaDecision
from orchestrator.speculation.verification import Choices, PromptLogprobs, SourceName


@dataclass(frozen=True)
class Result:
    """Result of a whole generation. Times in seconds; bytes of both directions.

    `choices`, `expected_tokens_per_s`: as in `Router`.
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
    choices: Choices
    expected_tokens_per_s: dict[SourceName, float]
    num_interrupted_tokens: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens and text of one or more rounds.

    `text_ends[i]`: number of characters of `text` that are final after token i. `recorded`: all
    tokens so far are in Redis. `finish` and `result` are set in the last chunk.
    """

    tokens: tuple[EmittedToken, ...]
    text: str
    text_ends: tuple[int, ...]
    finish: Finish | None
    recorded: bool
    rounds: tuple[Commitment, ...]
    result: Result | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """In the first chunk, if the request asks for them."""
