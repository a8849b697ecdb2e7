"""Record of one generation in the recorded traffic, and its observer.

Format "outrider-traffic/1": files `traffic-*.jsonl` in the operator's directory, one JSON object a
line, one line a generation, in no particular order. Fields:

- `format`: "outrider-traffic/1". `time`: end of the generation, UTC, ISO 8601.
- `model`: the target's model_fingerprint. `tokenizer`: its tokenizer_fingerprint; "" without one.
- `temperature`, `verification`: of the request. `finish`: stop, length or cancelled; null: it ended
  by an error, or its client left.
- `num_cut`: tokens at the prompt's start that are not recorded (`MAX_TOKENS`).
- `prompt_token_ids`, then `output_token_ids` [n]: the context, and the tokens that were emitted.
- `draft_token_ids` [n]: the draft token verified at the same position; null: there was none. It was
  accepted exactly if it equals the output token (with block verification also by chance).
- `top_token_ids` [n][k], `top_logprobs` [n][k]: the target's k most likely tokens at each emitted
  position, best first. Natural logarithms of the model's distribution at temperature 1, before
  penalties, biases and cuts, rounded to 1e-4. The mass of all other tokens is 1 - Σ exp.

Position i of the output has the context `prompt_token_ids + output_token_ids[:i]`. A generation
that was resumed is not recorded. No session id, client name or text is recorded; token ids are the
client's text, however.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.generation.observation import ObservedRound
from orchestrator.generation.state import GenerationState

FORMAT = "outrider-traffic/1"
# Tokens of a record: prompts are cut at their start, outputs at their end.
MAX_TOKENS = 4_096
_DIGITS = 4


@dataclass(frozen=True)
class ModelNames:
    """Fingerprints of the target's model and tokenizer, as in ModelInfo."""

    model: str
    tokenizer: str


@dataclass
class TrafficRecord:
    """Observer that collects one generation. `num_logprobs`: k of the format.

    `write` gets the record once, at the end.
    """

    names: ModelNames
    num_logprobs: int
    write: Callable[[TrafficRecord], None]
    draft_token_ids: list[int | None] = field(default_factory=list)
    top_token_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def observe(self, committed: ObservedRound) -> None:
        """Adds the positions of a round that have emitted a token."""
        result, outcome = committed.result, committed.outcome
        if len(self.top_token_ids) >= MAX_TOKENS:
            return
        assert result.top_ids is not None, "they were requested"
        assert result.top_logprobs is not None, "they were requested"
        num = outcome.num_accepted + (outcome.next_token is not None)
        drafts = committed.proposal.token_ids if committed.proposal is not None else ()
        self.draft_token_ids += [*drafts[:num], *[None] * (num - len(drafts))]
        self.top_token_ids += result.top_ids[:num].tolist()
        self.top_logprobs += result.top_logprobs[:num].tolist()

    def ended(self, state: GenerationState) -> None:
        """Completes the record and passes it on, unless nothing was generated."""
        num = min(state.num_output_tokens, len(self.top_token_ids), MAX_TOKENS)
        if not num:
            return
        start = max(0, state.prompt_len + num - MAX_TOKENS)
        self.values = {
            "format": FORMAT,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.names.model,
            "tokenizer": self.names.tokenizer,
            "temperature": state.params.temperature,
            "verification": state.verification.value,
            "finish": state.finish.reason.value if state.finish is not None else None,
            "num_cut": start,
            "prompt_token_ids": state.token_ids[start : state.prompt_len],
            "output_token_ids": state.token_ids[state.prompt_len : state.prompt_len + num],
        }
        self.write(self)

    def line(self) -> str:
        """The record as a line of JSON. Takes milliseconds: call it in a thread."""
        num = len(self.values["output_token_ids"])
        values = self.values | {
            "draft_token_ids": self.draft_token_ids[:num],
            "top_token_ids": self.top_token_ids[:num],
            "top_logprobs": [
                [round(value, _DIGITS) for value in row] for row in self.top_logprobs[:num]
            ],
        }
        return json.dumps(values, separators=(",", ":")) + "\n"


def read_records(directory: Path, num: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields recorded generations of a directory, the latest file first; at most `num`.

    Skips a last line that is still being written. Raises ValueError for another format.
    """
    yield from islice(_records(directory), num)


def _records(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.glob("traffic-*.jsonl"), reverse=True):
        with path.open(encoding="ascii") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    continue
                record = json.loads(line)
                if record.get("format") != FORMAT:
                    raise ValueError(f"{path}: format {record.get('format')!r} is not {FORMAT!r}")
                yield record
