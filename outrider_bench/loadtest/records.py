"""Record of one request as its client saw it, and its latencies. Pure.

Times are seconds from the start of the request's phase. Latencies count from the *intended* send
time: a request sent late because of a slow one before it has waited too. Otherwise the test would
suffer from coordinated omission.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

OK = "OK"
# The test was stopped while the request ran.
CUT = "CUT"


class Chunk(NamedTuple):
    """A message with tokens: arrival time and number of tokens."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True)
class Speculation:
    """Speculation statistics of a finished generation; counts as in SpeculationStats.

    `num_rows`: recent mean rows per verification pass; None without a draft.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_rounds: int = 0
    num_lookahead_hits: int = 0
    num_accepted_per_pos: tuple[int, ...] = ()
    num_rounds_per_gamma: tuple[int, ...] = ()
    draft_wait_s: float = 0.0
    verify_s: float = 0.0
    target_step_s: float = 0.0
    num_rows: float | None = None


@dataclass
class Record:
    """One request; complete once `ended_s` is set.

    `status`: OK, the name of a gRPC status, `HTTP` and its status, or CUT. `prompt_len`: tokens
    sent; in a session, the model reads more. `queued_s`: wait for a place, if the load limits the
    requests that run.
    """

    index: int
    intended_s: float
    prompt_len: int
    sent_s: float = 0.0
    queued_s: float = 0.0
    ended_s: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    status: str = CUT
    detail: str = ""
    finish_reason: str = ""
    retry_after_s: float | None = None
    num_cached_tokens: int = 0
    speculation: Speculation | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the request was answered completely."""
        return self.status == OK

    @property
    def num_tokens(self) -> int:
        """Number of tokens received."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def lateness_s(self) -> float:
        """Delay of sending caused by the load generator."""
        return self.sent_s - self.intended_s - self.queued_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None if none was received."""
        return self.chunks[0].at_s - self.intended_s if self.chunks else None

    @property
    def e2e_s(self) -> float | None:
        """End-to-end latency, until the last message or the failure; None while it runs."""
        return None if self.ended_s is None else self.ended_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (last token - first token) / (tokens - 1).

        As in `vllm bench serve`; None with fewer than two tokens.
        """
        if self.num_tokens < 2:
            return None
        return (self.chunks[-1].at_s - self.chunks[0].at_s) / (self.num_tokens - 1)

    @property
    def chunk_gaps_s(self) -> list[float]:
        """Inter-token latency per chunk: from message to message. Equals `itl` of other tools."""
        return [after.at_s - before.at_s for before, after in pairwise(self.chunks)]

    @property
    def token_gaps_s(self) -> list[float]:
        """Inter-token latency per token: a message's gap is divided evenly among its tokens."""
        return [
            gap / chunk.num_tokens
            for gap, chunk in zip(self.chunk_gaps_s, self.chunks[1:], strict=True)
            for _ in range(chunk.num_tokens)
        ]
