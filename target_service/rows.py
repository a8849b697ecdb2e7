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

from outrider.engine.draws import Reply
from outrider.sampling.params import SamplingParams
from outrider.serving.commands import Close, Failure, Forget, ServiceStatistics
from outrider.serving.scheduler import GenerationKey

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Open:
    key: GenerationKey
    session_id: str
    epoch: int
    kept_epoch: int
    prompt_len: int
    max_len: int
    params: SamplingParams
    priority: int = 0
    preempts: bool = False


@dataclass(frozen=True)
class Row:
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


Command = Open | Row | Close | Forget


@dataclass(frozen=True)
class RowReply:
    """`step_s`: time of the passes that the row took part in.

    `num_reused_tokens` of its context were found in the prefix cache.
    """

    key: GenerationKey
    reply: Reply
    step_s: float
    num_reused_tokens: int


RowOutcome = RowReply | Failure


@dataclass(frozen=True)
class TargetStatistics(ServiceStatistics):
    """As in target.proto's TargetLoad."""

    num_waiting_rows: int = 0
    num_steps_total: int = 0
    num_rows_total: int = 0
    num_tokens_total: int = 0
    num_preempted_total: int = 0
