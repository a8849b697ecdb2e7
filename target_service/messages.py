"""What the target is asked and answers, as plain values; a generation is named by (peer, id).

Knows neither protobuf nor the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.engine.interface import BlockScores
from outrider.errors import InvalidRequest
from outrider.model_server.messages import Close, Failure, Forget, ServiceStatistics
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class OpenTarget:
    key: GenerationKey
    session_id: str
    epoch: int
    kept_epoch: int
    prompt_len: int
    max_len: int
    params: SamplingParams
    priority: int = 0
    preempts: bool = False
    # How long ago it was begun, here or elsewhere.
    age_s: float = 0.0


@dataclass(frozen=True)
class Verify:
    """Lengths and meanings as in target.proto's VerifyRow."""

    key: GenerationKey
    keep_len: int
    context_token_ids: Ids
    draft_token_ids: Ids
    supports: Sequence[Ids] | None

    @cached_property  # read by each check of a row; joined once
    def token_ids(self) -> Ids:
        return np.concatenate((self.context_token_ids, self.draft_token_ids))

    @property
    def num_tokens(self) -> int:
        """Length of the context with the row's tokens."""
        return self.keep_len + len(self.context_token_ids) + len(self.draft_token_ids)

    def check(self, max_len: int, max_gamma: int, vocab_size: int) -> None:
        """Raises InvalidRequest for what a generation of `max_len` tokens cannot ask."""
        gamma = len(self.draft_token_ids)
        if len(self.context_token_ids) == 0:
            raise InvalidRequest("context_token_ids", "must not be empty")
        if gamma > max_gamma:
            raise InvalidRequest("draft_token_ids", f"{gamma} tokens; at most {max_gamma}")
        if self.num_tokens > max_len:
            raise InvalidRequest(
                "context_token_ids", f"{self.num_tokens} tokens; max_len is {max_len}"
            )
        if self.token_ids.max() >= vocab_size:
            raise InvalidRequest("token_ids", f"must be in [0, {vocab_size})")
        if self.supports is None:
            return
        if len(self.supports) != gamma:
            raise InvalidRequest("support_sizes", f"{len(self.supports)} for {gamma} draft tokens")
        for ids in self.supports:
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise InvalidRequest("support_ids", f"must be in [0, {vocab_size})")
            if len(set(ids.tolist())) != len(ids):
                raise InvalidRequest("support_ids", "a token stands twice in a support")

    def head(self, num_drafts: int) -> Verify:
        """The row with only its first `num_drafts` draft tokens.

        Where there are supports it keeps that of the draft token after them, too: the logits of
        that position are there, and the token can be judged.
        """
        supports = self.supports[: num_drafts + 1] if self.supports is not None else None
        drafts = self.draft_token_ids[:num_drafts]
        return Verify(self.key, self.keep_len, self.context_token_ids, drafts, supports)


Command = OpenTarget | Verify | Close | Forget


@dataclass
class DraftSearch:
    """How many of the row's draft tokens leave its logits finite: bisection, one pass each.

    The logits do not say which token is the bad one: NaN may reach earlier positions of its pass.
    The last pass is always one with finite logits, so that its keys and values are right.
    """

    row: Verify
    # Draft tokens with which the logits were not finite, and with which they were.
    num_bad: int
    num_good: int = -1

    def observe(self, num_drafts: int, *, is_finite: bool) -> bool:
        """After a pass with so many draft tokens; whether it was the last one."""
        if is_finite:
            self.num_good = num_drafts
        else:
            self.num_bad = num_drafts
            self.num_good = min(self.num_good, num_drafts - 1)
        return self._is_found and self.num_good in (num_drafts, -1)

    def next_row(self) -> Verify:
        """What to run next."""
        middle = (self.num_good + self.num_bad) // 2
        return self.row.head(self.num_good if self._is_found else middle)

    @property
    def _is_found(self) -> bool:
        return self.num_bad - self.num_good == 1


@dataclass(frozen=True)
class Verified:
    """`step_s`: time of the passes that the row took part in.

    `num_reused_tokens` of its context were found in the prefix cache. `num_left_out`: draft tokens
    at the row's end that were not run, as in target.proto.
    """

    key: GenerationKey
    reply: BlockScores
    step_s: float
    num_reused_tokens: int
    num_left_out: int = 0


RowOutcome = Verified | Failure


@dataclass(frozen=True)
class TargetStatistics(ServiceStatistics):
    """As in target.proto's TargetLoad."""

    num_waiting_rows: int = 0
    num_steps_total: int = 0
    num_rows_total: int = 0
    num_tokens_total: int = 0
    num_preempted_total: int = 0
