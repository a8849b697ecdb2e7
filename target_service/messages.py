"""Commands and results of the target tier as plain values. `key` names a generation.

They mirror the messages of target.proto, which describes the fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.engine.interface import BlockScores, PromptScores
from outrider.errors import InvalidRequest
from outrider.model_server.grammar_gate import OpenGrammar
from outrider.model_server.messages import Close, Failure, Forget, ServiceStatistics
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class OpenTarget:
    """Opens a generation. `age_s`: seconds since it began, here or at another replica.

    `grammar`: of the output's format, or the error of its compilation.
    """

    key: GenerationKey
    session_id: str
    epoch: int
    kept_epoch: int
    prompt_len: int
    max_len: int
    params: SamplingParams
    priority: int = 0
    preempts: bool = False
    age_s: float = 0.0
    grammar: OpenGrammar = None

    def check(self, max_context_len: int, vocab_size: int) -> None:
        """Raises InvalidRequest if a field is out of range for the replica's model."""
        if not 1 <= self.prompt_len < self.max_len:
            raise InvalidRequest(
                "max_len", f"{self.max_len}; must exceed prompt_len ({self.prompt_len}, at least 1)"
            )
        if self.max_len > max_context_len:
            raise InvalidRequest(
                "max_len", f"{self.max_len} exceeds the model's context; at most {max_context_len}"
            )
        self.params.validate(vocab_size)


@dataclass(frozen=True)
class Verify:
    """Verify request; mirrors target.proto's VerifyRow."""

    key: GenerationKey
    keep_len: int
    context_token_ids: Ids
    draft_token_ids: Ids
    supports: Sequence[Ids] | None
    with_prompt_logprobs: bool = False

    @cached_property
    def token_ids(self) -> Ids:
        return np.concatenate((self.context_token_ids, self.draft_token_ids))

    @property
    def committed_len(self) -> int:
        """Length of the committed context, without draft tokens."""
        return self.keep_len + len(self.context_token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of the context with the draft tokens."""
        return self.committed_len + len(self.draft_token_ids)

    def check(self, max_len: int, max_gamma: int, vocab_size: int) -> None:
        """Raises InvalidRequest if a field is invalid. `max_len` is the generation's."""
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
        if self.with_prompt_logprobs and self.keep_len:
            raise InvalidRequest("with_prompt_logprobs", f"not with keep_len {self.keep_len}")
        if self.supports is None:
            return
        if len(self.supports) != gamma:
            raise InvalidRequest("support_sizes", f"{len(self.supports)} for {gamma} draft tokens")
        for ids in self.supports:
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise InvalidRequest("support_ids", f"must be in [0, {vocab_size})")
            if len(set(ids.tolist())) != len(ids):
                raise InvalidRequest("support_ids", "a support contains a token twice")

    def head(self, num_drafts: int) -> Verify:
        """The request with its first `num_drafts` draft tokens only.

        With supports it keeps the support of the next draft token as well: its position has logits,
        so that the token can be verified without being run.
        """
        supports = self.supports[: num_drafts + 1] if self.supports is not None else None
        drafts = self.draft_token_ids[:num_drafts]
        return replace(self, draft_token_ids=drafts, supports=supports)


Command = OpenTarget | Verify | Close | Forget


@dataclass
class DraftSearch:
    """Bisection for the most draft tokens of a request that give finite logits, one pass a step.

    The logits do not show which token causes NaN: it may reach earlier positions of the pass. The
    last pass is always one with finite logits, so that its keys and values are valid.

    `num_bad`: least known number of draft tokens without finite logits. `num_good`: greatest known
    number with finite logits; -1: none is known, not even without draft tokens.
    """

    request: Verify
    num_bad: int
    num_good: int = -1

    def observe(self, num_drafts: int, *, is_finite: bool) -> bool:
        """Records a pass with `num_drafts` draft tokens. True if it was the last one."""
        if is_finite:
            self.num_good = num_drafts
        else:
            self.num_bad = num_drafts
            self.num_good = min(self.num_good, num_drafts - 1)
        return self._is_found and self.num_good in (num_drafts, -1)

    def next_request(self) -> Verify:
        """The request of the next pass."""
        middle = (self.num_good + self.num_bad) // 2
        return self.request.head(self.num_good if self._is_found else middle)

    @property
    def _is_found(self) -> bool:
        return self.num_bad - self.num_good == 1


@dataclass(frozen=True)
class Verified:
    """Verify result; mirrors target.proto's VerifyResult.

    `step_s`: time of the passes that the request was in. `num_reused_tokens`: context tokens found
    in the prefix cache. `num_left_out`: draft tokens at the end that were not run. `prompt`: of the
    prompt's tokens after the first, if requested.
    """

    key: GenerationKey
    reply: BlockScores
    step_s: float
    num_reused_tokens: int
    num_left_out: int = 0
    prompt: PromptScores | None = None


Event = Verified | Failure


@dataclass(frozen=True)
class TargetStatistics(ServiceStatistics):
    """Mirrors target.proto's TargetLoad."""

    num_waiting_rows: int = 0
    num_steps_total: int = 0
    num_rows_total: int = 0
    num_tokens_total: int = 0
    num_preempted_total: int = 0
