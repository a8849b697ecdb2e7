"""Sampling parameters and their validation. `warp` and the engine implement their effect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from outrider.errors import InvalidRequest
from outrider.sampling.structured_outputs import FIELD, StructuredOutputs

MAX_LOGPROBS = 20
MAX_STOP_TEXTS = 64
MAX_STOP_TEXT_CHARS = 1024
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LEN = 256
MAX_TOKEN_LIST = 4096
# Division of logits by a smaller number overflows float32.
MIN_REPETITION_PENALTY = 1e-30
# Limit before the vocabulary's size is known; that is the real limit.
MAX_ALLOWED_TOKENS = 1 << 20
# Maximum entries of each list. Checked on received messages before they are copied.
MAX_ENTRIES: Mapping[str, int] = {
    "stop": MAX_STOP_TEXTS,
    "stop_token_ids": MAX_TOKEN_LIST,
    "logit_bias": MAX_LOGIT_BIASES,
    "allowed_token_ids": MAX_ALLOWED_TOKENS,
    "bad_words": MAX_BAD_WORDS,
    "bad_words_token_ids": MAX_BAD_WORDS,
}


class Verification(Enum):
    """Verification method at temperature > 0. At 0, all methods compare with the argmax."""

    REJECTION = "rejection"
    COUPLED = "coupled"
    BLOCK = "block"


def check_entries(given: Any, limits: Mapping[str, int] = MAX_ENTRIES) -> None:
    """Raises InvalidRequest if a list attribute of `given` has too many entries."""
    for name, limit in limits.items():
        if (size := len(getattr(given, name))) > limit:
            raise InvalidRequest(f"sampling.{name}", f"{size} entries; at most {limit}")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters with vLLM's names, meanings and defaults. `top_k` 0 or -1: all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 1
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    """Only until they are encoded: `bad_words_token_ids` then has their token sequences."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def needs_supports(self, verification: Verification) -> bool:
        """Whether proposals carry supports: draft tokens have a distribution of their own."""
        return not self.greedy and verification is not Verification.COUPLED

    @property
    def penalises(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidRequest with the field and the allowed values."""
        self._validate_numbers()
        self._validate_lists(vocab_size)
        if self.structured_outputs is not None:
            self._validate_structured(self.structured_outputs)

    def _validate_structured(self, structured_outputs: StructuredOutputs) -> None:
        """Refuses what could contradict the format: it alone decides where the output may end."""
        structured_outputs.validate()
        for name, is_set in (
            ("ignore_eos", self.ignore_eos),
            ("min_tokens", self.min_tokens > 0),
            ("allowed_token_ids", bool(self.allowed_token_ids)),
            ("bad_words", bool(self.bad_words)),
            ("bad_words_token_ids", bool(self.bad_words_token_ids)),
        ):
            if is_set:
                raise InvalidRequest(FIELD, f"not allowed with {name}")

    def _validate_numbers(self) -> None:
        ranges: tuple[tuple[str, float, str, bool], ...] = (
            ("temperature", self.temperature, "[0, 100]", 0 <= self.temperature <= 100),
            ("top_p", self.top_p, "(0, 1]", 0 < self.top_p <= 1),
            ("top_k", self.top_k, "-1 (all), 0 (all) or more", self.top_k >= -1),
            ("min_p", self.min_p, "[0, 1]", 0 <= self.min_p <= 1),
            ("max_tokens", self.max_tokens, "1 or more", self.max_tokens >= 1),
            (
                "min_tokens",
                self.min_tokens,
                f"0 to max_tokens ({self.max_tokens})",
                0 <= self.min_tokens <= self.max_tokens,
            ),
            ("presence_penalty", self.presence_penalty, "[-2, 2]", abs(self.presence_penalty) <= 2),
            (
                "frequency_penalty",
                self.frequency_penalty,
                "[-2, 2]",
                abs(self.frequency_penalty) <= 2,
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f"[{MIN_REPETITION_PENALTY:g}, 10]",
                MIN_REPETITION_PENALTY <= self.repetition_penalty <= 10,
            ),
            (
                "logprobs",
                self.logprobs or 0,
                f"0 to {MAX_LOGPROBS}",
                0 <= (self.logprobs or 0) <= MAX_LOGPROBS,
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs or 0,
                f"0 to {MAX_LOGPROBS}",
                0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS,
            ),
        )
        for name, value, allowed, is_right in ranges:
            if not (math.isfinite(value) and is_right):
                raise InvalidRequest(f"sampling.{name}", f"{value:g} is not in {allowed}")

    def _validate_lists(self, vocab_size: int) -> None:
        check_entries(self, {**MAX_ENTRIES, "allowed_token_ids": vocab_size})
        _check_lengths("stop", self.stop, "a string", "characters", MAX_STOP_TEXT_CHARS)
        _check_lengths("bad_words", self.bad_words, "a word", "characters", MAX_BAD_WORD_LEN)
        sequences = self.bad_words_token_ids
        _check_lengths("bad_words_token_ids", sequences, "a sequence", "tokens", MAX_BAD_WORD_LEN)
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", tuple(self.logit_bias)),
            ("allowed_token_ids", self.allowed_token_ids),
            ("bad_words_token_ids", tuple(itertools.chain.from_iterable(sequences))),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                raise InvalidRequest(f"sampling.{name}", f"token {bad} is not in [0, {vocab_size})")
        for token_id, bias in self.logit_bias.items():
            if not abs(bias) <= 100:
                raise InvalidRequest(
                    "sampling.logit_bias", f"{bias:g} of token {token_id} is not in [-100, 100]"
                )


def _check_lengths(name: str, entries: Sequence[Sized], what: str, unit: str, most: int) -> None:
    for entry in entries:
        if not 1 <= len(entry) <= most:
            raise InvalidRequest(
                f"sampling.{name}", f"{what} of {len(entry)} {unit}; 1 to {most} are allowed"
            )
