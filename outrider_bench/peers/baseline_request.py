"""Request to the Hugging Face baseline: one line of JSON, validated by field."""

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
    """One generation; the JSON has the same field names. There, `prompt` may also be the index of a
    prompt.

    `num_assistant_tokens`, `schedule` and `confidence_threshold` are transformers' settings of
    assisted generation. If none is given, its defaults hold: 20 tokens, fewer if the draft's
    confidence falls below a threshold. If any is given, the threshold defaults to 0, so that a
    constant number is constant.
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
        for is_valid, field, message in (
            (are_ids(self.prompt), "prompt", "must be a non-empty list of token ids"),
            (_is_count(self.max_new_tokens), "max_new_tokens", "must be a positive integer"),
            (self.variant in VARIANTS, "variant", f"must be one of {', '.join(VARIANTS)}"),
            (_is_number(self.temperature), "temperature", "must be a number of at least 0"),
            (type(self.seed) is int, "seed", "must be an integer"),
            (
                count is None or _is_count(count),
                "num_assistant_tokens",
                "must be a positive integer",
            ),
            (schedule in (None, *SCHEDULES), "schedule", f"must be one of {', '.join(SCHEDULES)}"),
            (
                threshold is None or _is_number(threshold),
                "confidence_threshold",
                "must be a number of at least 0",
            ),
            (
                self.variant == "assisted" or not self.is_tuned,
                "variant",
                "plain accepts no settings of assisted generation",
            ),
        ):
            check(is_valid, field, message)

    @property
    def is_tuned(self) -> bool:
        """Whether any setting of assisted generation is given."""
        settings = (self.num_assistant_tokens, self.schedule, self.confidence_threshold)
        return any(setting is not None for setting in settings)

    @classmethod
    def from_json(cls, line: str, prompts: Sequence[list[int]] = ()) -> BaselineRequest:
        """Parses a line. It may name one of `prompts` by index. Raises InvalidRequest with the
        field.
        """
        try:
            fields = json.loads(line)
        except ValueError:
            raise InvalidRequest("request", "must be JSON") from None
        check(isinstance(fields, dict), "request", "must be a JSON object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in fields:
            check(name in known, name, "is unknown")
        for name, field in known.items():
            check(name in fields or field.default is not dataclasses.MISSING, name, "is missing")
        if type(fields["prompt"]) is int:
            check(
                0 <= fields["prompt"] < len(prompts),
                "prompt",
                f"index out of range; there are {len(prompts)} prompts",
            )
            fields["prompt"] = prompts[fields["prompt"]]
        return cls(**fields)


def check(is_valid: bool, field: str, message: str) -> None:
    """Raises InvalidRequest for `field` unless `is_valid`."""
    if not is_valid:
        raise InvalidRequest(field, message)


def are_ids(value: Any) -> bool:
    """Whether `value` is a non-empty list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0
