"""Commands and events of the draft tier as plain values. `key` names a generation.

They mirror the messages of draft.proto, which describes the fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest
from outrider.model_server.grammar_gate import OpenGrammar
from outrider.model_server.messages import Close, Failure, Forget, ServiceStatistics
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams, Verification

Ids = npt.NDArray[Any]

# Orchestrators ask for at most 4. The tree is walked recursively, one stack frame per round.
_MAX_LOOKAHEAD = 16


class SupportWeights(NamedTuple):
    """Truncated distribution that a token was sampled from; float32 weights, most likely first."""

    token_ids: Ids
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TargetIdentity:
    """Target that a stream's generations belong to. Mirrors draft.proto's DraftTarget."""

    name: str = ""
    model_fingerprint: str = ""
    # As in DraftTarget; can be unpacked.
    unshared_ids: bytes = b""
    # Of the tokenizer whose text is re-encoded; empty: token ids are the draft's own.
    tokenizer_fingerprint: str = ""


@dataclass(frozen=True)
class OpenDraft:
    key: GenerationKey
    session_id: str
    epoch: int
    token_ids: Ids
    prompt_len: int
    max_len: int
    params: SamplingParams
    verification: Verification
    gamma: int
    ahead_gamma: int
    lookahead: int
    fan_out: int
    vocab_size: int
    tells_unlikely: bool = False
    target: TargetIdentity = TargetIdentity()
    # Of the output's format, or the error of its compilation.
    grammar: OpenGrammar = None

    def check(self, max_gamma: int) -> None:
        """Raises InvalidRequest if a field is out of range. `max_gamma` is the replica's."""
        num_tokens = len(self.token_ids)
        if not num_tokens:
            raise InvalidRequest("token_ids", "must not be empty")
        if not 1 <= self.prompt_len <= num_tokens:
            raise InvalidRequest("prompt_len", f"{self.prompt_len} is not in [1, {num_tokens}]")
        if self.vocab_size < 1 or self.token_ids.max() >= self.vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {self.vocab_size})")
        if self.lookahead > _MAX_LOOKAHEAD:
            raise InvalidRequest("lookahead", f"{self.lookahead}; at most {_MAX_LOOKAHEAD}")
        _check_gamma(self.gamma, self.ahead_gamma, max_gamma)
        self.params.validate(self.vocab_size)


@dataclass(frozen=True)
class Commit:
    key: GenerationKey
    token_ids: Sequence[int]
    committed_len: int
    gamma: int
    ahead_gamma: int

    def check(self, max_gamma: int, vocab_size: int) -> None:
        """Raises InvalidRequest if a field is out of range; the tree checks `committed_len`."""
        _check_gamma(self.gamma, self.ahead_gamma, max_gamma)
        if max(self.token_ids, default=0) >= vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {vocab_size})")


def check_commit(
    former_len: int, token_ids: Sequence[int], committed_len: int, max_len: int
) -> None:
    """Raises InvalidRequest unless the tokens follow `former_len` committed ones."""
    num = len(token_ids)
    if not num or committed_len != former_len + num or committed_len > max_len:
        raise InvalidRequest(
            "committed_len",
            f"{committed_len}; must be {former_len} + {num} new tokens (at least 1); max_len is "
            f"{max_len}",
        )


def _check_gamma(gamma: int, ahead_gamma: int, max_gamma: int) -> None:
    for name, value in (("gamma", gamma), ("ahead_gamma", ahead_gamma)):
        if value > max_gamma:
            raise InvalidRequest(name, f"{value}; at most {max_gamma}")


Command = OpenDraft | Commit | Close | Forget


@dataclass(frozen=True)
class TargetStatistics:
    """Mirrors draft.proto's DraftTargetLoad."""

    name: str
    model_fingerprint: str
    num_open_generations: int
    num_waiting_generations: int
    num_run_tokens_total: int
    num_compared_tokens_total: int
    num_agreed_tokens_total: int


@dataclass(frozen=True)
class DraftStatistics(ServiceStatistics):
    """Mirrors draft.proto's DraftLoad."""

    num_waiting_generations: int = 0
    targets: tuple[TargetStatistics, ...] = ()


@dataclass(frozen=True)
class Proposed:
    """A block, or the tokens of it sampled so far. Mirrors draft.proto's Proposal."""

    key: GenerationKey
    assumed_token_ids: Sequence[int]
    base_len: int
    token_ids: Sequence[int]
    supports: Sequence[SupportWeights] | None


Event = Proposed | Failure
