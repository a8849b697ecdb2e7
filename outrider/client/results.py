"""What a generation returns, as plain values. Field names are those of the contract.

docs/reference/requests.md describes the fields of `Generation` and `SpeculationStats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from outrider.client.messages import enum_name, read_message
from outrider.v1 import orchestrator_pb2

TokenOrigin = Literal["accepted", "recovered", "bonus", "plain"]
FinishReason = Literal["stop", "length", "cancelled"]

_ORIGIN: Any = orchestrator_pb2.GenerateResponse.DESCRIPTOR.fields_by_name["origins"]
_ORIGIN_NAMES: dict[int, Any] = {
    value.number: enum_name(_ORIGIN, value.number) for value in _ORIGIN.enum_type.values
}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a token, and the most likely tokens of its position, best first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens, each given those before it.

    `logprobs[i]` is of token i + 1. `top_ids` and `top_logprobs` have `num_top` entries for each of
    these positions, best first. `ranks[i]`: 1 plus the number of tokens that are more likely than
    token i + 1; empty if the target is of a version that does not report them.
    """

    token_ids: list[int]
    logprobs: list[float]
    num_top: int
    top_ids: list[int]
    top_logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message of a stream adds to the output. `logprobs` is empty unless requested.

    `text_ends[i]`: number of characters of `text` that are final after token i.
    """

    text: str
    token_ids: list[int]
    origins: list[TokenOrigin]
    logprobs: list[TokenLogprobs]
    text_ends: list[int]

    def pieces(self) -> Iterator[tuple[str, TokenOrigin]]:
        """The text split by token; yields (text, origin of its last token)."""
        start = 0
        for origin, end in zip(self.origins, self.text_ends, strict=False):
            if end > start:
                yield self.text[start:end], origin
                start = end
        if start < len(self.text):
            yield self.text[start:], self.origins[-1] if self.origins else "plain"


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens. `cached_tokens`: prompt tokens whose KV was reused at the target."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class SourceStats:
    """Statistics of one draft source in a generation."""

    source: str
    num_rounds_by_reason: dict[str, int]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_rejected_tokens: int
    acceptance_rate: float | None
    expected_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class GammaDecision:
    """Inputs of the choice of γ. Times are expected values for a round, in seconds."""

    gamma: int
    waiting_gamma: int
    is_fixed: bool
    survival: list[float]
    target_step_s: list[float]
    mean_num_rows: float
    draft_step_s: float
    draft_overhead_s: float
    target_overhead_s: float
    lookahead_hit_rate: float
    tokens_per_s: list[float]
    waiting_tokens_per_s: list[float]


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Speculation statistics of a generation: acceptance rate α, tokens per round τ, times."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    num_rounds: int
    time_to_first_token_s: float
    duration_s: float
    tokens_per_s: float | None
    gamma: int | None
    verification: str
    draft_wire_bytes: int
    target_wire_bytes: int
    num_lookahead_hits: int
    num_rejected_tokens: int
    num_rounds_per_gamma: list[int]
    target_step_s: float
    verify_s: float
    draft_wait_s: float
    decision: GammaDecision | None
    sources: list[SourceStats]


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """What the last message of a stream adds."""

    finish_reason: FinishReason
    stop_text: str | None
    stop_token_id: int | None
    eos_token_id: int | None
    usage: Usage
    speculation: SpeculationStats
    seed: int
    recorded: bool
    interrupted_answer_tokens: int | None


@dataclass(frozen=True, slots=True)
class Generation(GenerationEnd):
    """A finished generation: its whole output, why it ended, and its statistics.

    `finish_reason` "cancelled": the server stopped before the end.
    """

    session_id: str
    text: str
    token_ids: list[int]
    origins: list[TokenOrigin]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: PromptLogprobs | None


@dataclass
class Output:
    """The output of one stream as far as it was received. `end` is set by its last message."""

    session_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    origins: list[TokenOrigin] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    end: GenerationEnd | None = None

    def add(self, message: orchestrator_pb2.GenerateResponse) -> Chunk:
        """Appends a message of the stream, and returns what it adds."""
        chunk = Chunk(
            text=message.text,
            token_ids=list(message.token_ids),
            origins=[_ORIGIN_NAMES.get(origin, "plain") for origin in message.origins],
            logprobs=[read_message(TokenLogprobs, each) for each in message.logprobs],
            text_ends=list(message.text_ends),
        )
        self.session_id = message.session_id
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.origins += chunk.origins
        self.logprobs += chunk.logprobs
        if message.HasField("prompt_logprobs"):
            self.prompt_logprobs = read_message(PromptLogprobs, message.prompt_logprobs)
        if message.HasField("result"):
            self.end = read_message(GenerationEnd, message.result)
        return chunk

    def finished(self) -> Generation | None:
        """The whole result; None before the last message."""
        if self.end is None:
            return None
        names = GenerationEnd.__dataclass_fields__
        return Generation(
            **{name: getattr(self.end, name) for name in names},
            session_id=self.session_id,
            text=self.text,
            token_ids=self.token_ids,
            origins=self.origins,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
