"""What the short requests return, as plain values: sessions, models, results of the audit.

Field names are those of the contract, which describes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Replica that has a session's keys and values, and how many tokens of them."""

    replica: str
    epoch: int
    cached_len: int


@dataclass(frozen=True, slots=True)
class Session:
    """A session: its tokens, its number of turns, its statistics, the replicas with its KV."""

    session_id: str
    token_ids: list[int]
    in_use: bool
    epoch: int
    num_turns: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_emitted_tokens: int
    target_kv: KvHandle | None
    draft_kv: KvHandle | None
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """An entry of the list of sessions."""

    session_id: str
    num_tokens: int
    num_turns: int
    in_use: bool
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class SessionList:
    """Sessions by name. `num_unreadable`: further ones whose Redis record cannot be read."""

    sessions: list[SessionSummary]
    num_unreadable: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A replica's model. `sampling_defaults` has the fields that the model sets."""

    name: str
    architecture: str
    vocab_size: int
    tokenizer_fingerprint: str
    model_fingerprint: str
    max_context_len: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    num_parameters: int
    kv_capacity_tokens: int
    max_gamma: int
    attention_backend: str
    linear_kernels: dict[str, int]
    cuda_graphs: bool
    tensor_parallel_size: int
    quantization: str
    sampling_defaults: dict[str, Any] | None
    target_tokenizer_fingerprints: list[str]


@dataclass(frozen=True, slots=True)
class DraftPairing:
    """Result of comparing the draft's vocabulary with the target's."""

    num_differing_ids: int
    is_assumed: bool
    refused: str
    is_reencoded: bool


@dataclass(frozen=True, slots=True)
class DraftRevision:
    """A draft revision: its role, and its acceptance rate in the current comparison."""

    revision: str
    model: str
    role: str
    num_replicas: int
    num_generations: int
    acceptance_rate: float | None


@dataclass(frozen=True, slots=True)
class DraftRollout:
    """Draft revisions of the tier, and the last change."""

    version: int
    revisions: list[DraftRevision]
    decision: str


@dataclass(frozen=True, slots=True)
class Models:
    """The models that an orchestrator serves. `draft` is None while no draft is connected."""

    target: ModelInfo
    draft: ModelInfo | None
    default_gamma: int | None
    max_gamma: int
    draft_pairing: DraftPairing | None
    draft_rollout: DraftRollout | None


@dataclass(frozen=True, slots=True)
class AuditTest:
    """Sequential test of a hypothesis that holds if verification is exact."""

    name: str
    num_trials: int
    age_s: float
    observed: float
    expected: float
    log_evidence: float
    max_log_evidence: float
    alarm_log_evidence: float
    num_alarms: int
    false_alarm_probability: float
    period_s: float
    expected_trials: float


@dataclass(frozen=True, slots=True)
class AuditFailure:
    """A generation whose re-run differs by more than rounding."""

    time_s: float
    session_id: str
    verification: str
    index: int
    prompt_len: int
    gap: float
    num_differing_tokens: int
    replicas: list[str]
    rerun_replica: str
    token_id: int | None
    expected_id: int | None


@dataclass(frozen=True, slots=True)
class Audit:
    """Results of the losslessness audit of one orchestrator since its start."""

    share: float
    tolerance: float
    num_generations: dict[str, int]
    num_dropped: dict[str, int]
    num_tokens: int
    num_near_ties: int
    max_gap: float
    tests: list[AuditTest]
    failures: list[AuditFailure]
    planted_bias: float
