"""What is asked of the Hugging Face baseline: one line of JSON, checked by field.

Owns the names and what they may hold. Knows no models.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import InvalidRequest

VARIANTS = ("plain", "assisted")
SCHEDULES = ("constant", "heuristic", "heuristic_transient")


@dataclass(frozen=True, kw_only=True)
class BaselineRequest:
    """One generation, by the names of the JSON fields; `prompt` may there be a prompt's number.

    `num_assistant_tokens`, `schedule` and `confidence_threshold` are transformers' settings of
    assisted generation. With none of them given its defaults hold (20 tokens, fewer where the
    draft's confidence falls below a threshold); with any of them, the threshold is 0 unless
    given, so that a constant number is constant.
    """

    prompt: list[int]
    max_new_tokens: int
    variant: str = "plain"
    temperature: float = 0.0
    seed: int = 0
    num_assistant_tokens: int | None = None
    schedule: str | None = None
    confidence_threshold: float | None = None

    def __post_init__(self) -> None:
        count, schedule, threshold = (
            self.num_assistant_tokens,
            self.schedule,
            self.confidence_threshold,
        )
        for holds, field, why in (
            (are_ids(self.prompt), "prompt", "is no list of token ids"),
            (_is_count(self.max_new_tokens), "max_new_tokens", "is no positive integer"),
            (self.variant in VARIANTS, "variant", f"is none of {', '.join(VARIANTS)}"),
            (_is_number(self.temperature), "temperature", "is no number from 0"),
            (type(self.seed) is int, "seed", "is no integer"),
            (count is None or _is_count(count), "num_assistant_tokens", "is no positive integer"),
            (schedule in (None, *SCHEDULES), "schedule", f"is none of {', '.join(SCHEDULES)}"),
            (
                threshold is None or _is_number(threshold),
                "confidence_threshold",
                "is no number from 0",
            ),
            (
                self.variant == "assisted" or not self.is_tuned,
                "variant",
                "plain decoding has no settings of assisted generation",
            ),
        ):
            check(holds, field, why)

    @property
    def is_tuned(self) -> bool:
        """Whether any setting of assisted generation is given."""
        settings = (self.num_assistant_tokens, self.schedule, self.confidence_threshold)
        return any(setting is not None for setting in settings)

    @classmethod
    def from_json(cls, line: str, prompts: Sequence[list[int]] = ()) -> BaselineRequest:
        """`prompts` are those that a line may name by number. Raises InvalidRequest, by field."""
        try:
            fields = json.loads(line)
        except ValueError:
            raise InvalidRequest("request", "is no JSON") from None
        check(isinstance(fields, dict), "request", "is no JSON object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            check(name in known, name, "is unknown")
        for name, field in known.items():
            check(name in fields or field.default is not dataclasses.MISSING, name, "is missing")
        if type(fields["prompt"]) is int:
            check(0 <= fields["prompt"] < len(prompts), "prompt", f"there are {len(prompts)}")
            fields["prompt"] = prompts[fields["prompt"]]
        return cls(**fields)


def check(holds: bool, field: str, why: str) -> None:
    if not holds:
        raise InvalidRequest(field, why)


def are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0
