"""What the draft is told and says, as plain values; a generation is named by (peer, id).

Knows neither protobuf nor the engine. Meanings as in draft.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from outrider.model_server.messages import Close, Failure, Forget, ServiceStatistics
from outrider.model_server.scheduler import GenerationKey
from outrider.sampling.params import SamplingParams, Verification

Ids = npt.NDArray[Any]


class SupportWeights(NamedTuple):
    """The truncated distribution a token was drawn from; float32 weights, likeliest first."""

    token_ids: Ids
    weights: npt.NDArray[np.float32]


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


@dataclass(frozen=True)
class Commit:
    key: GenerationKey
    token_ids: Sequence[int]
    committed_len: int
    gamma: int
    ahead_gamma: int


Command = OpenDraft | Commit | Close | Forget


@dataclass(frozen=True)
class DraftStatistics(ServiceStatistics):
    """As in draft.proto's DraftLoad."""

    num_waiting_generations: int = 0


@dataclass(frozen=True)
class Proposed:
    key: GenerationKey
    assumed_token_ids: Sequence[int]
    base_len: int
    token_ids: Sequence[int]
    supports: Sequence[SupportWeights] | None


Event = Proposed | Failure
