from outrider.v1 import model_pb2 as _model_pb2
from outrider.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftServiceGetModelInfoRequest(_message.Message):
    __slots__ = ("with_token_hashes",)
    WITH_TOKEN_HASHES_FIELD_NUMBER: _ClassVar[int]
    with_token_hashes: bool
    def __init__(self, with_token_hashes: bool = ...) -> None: ...

class DraftServiceGetModelInfoResponse(_message.Message):
    __slots__ = ("model", "load", "costs", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelInfo
    load: DraftLoad
    costs: _model_pb2.StepCosts
    state: _model_pb2.ReplicaState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelInfo, _Mapping]] = ..., load: _Optional[_Union[DraftLoad, _Mapping]] = ..., costs: _Optional[_Union[_model_pb2.StepCosts, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.ReplicaState, str]] = ...) -> None: ...

class DraftLoad(_message.Message):
    __slots__ = ("num_open_generations", "num_idle_sessions", "num_opened_total", "num_closed_total", "kv_used_tokens", "num_prefill_tokens_total", "num_prefix_queried_tokens_total", "num_prefix_hit_tokens_total", "num_waiting_generations", "targets")
    NUM_OPEN_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_IDLE_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPENED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_CLOSED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_QUERIED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    num_open_generations: int
    num_idle_sessions: int
    num_opened_total: int
    num_closed_total: int
    kv_used_tokens: int
    num_prefill_tokens_total: int
    num_prefix_queried_tokens_total: int
    num_prefix_hit_tokens_total: int
    num_waiting_generations: int
    targets: _containers.RepeatedCompositeFieldContainer[DraftTargetLoad]
    def __init__(self, num_open_generations: _Optional[int] = ..., num_idle_sessions: _Optional[int] = ..., num_opened_total: _Optional[int] = ..., num_closed_total: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., num_prefill_tokens_total: _Optional[int] = ..., num_prefix_queried_tokens_total: _Optional[int] = ..., num_prefix_hit_tokens_total: _Optional[int] = ..., num_waiting_generations: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[DraftTargetLoad, _Mapping]]] = ...) -> None: ...

class DraftTargetLoad(_message.Message):
    __slots__ = ("name", "model_fingerprint", "num_open_generations", "num_waiting_generations", "num_run_tokens_total", "num_compared_tokens_total", "num_agreed_tokens_total")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUN_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPARED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_AGREED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_fingerprint: str
    num_open_generations: int
    num_waiting_generations: int
    num_run_tokens_total: int
    num_compared_tokens_total: int
    num_agreed_tokens_total: int
    def __init__(self, name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., num_open_generations: _Optional[int] = ..., num_waiting_generations: _Optional[int] = ..., num_run_tokens_total: _Optional[int] = ..., num_compared_tokens_total: _Optional[int] = ..., num_agreed_tokens_total: _Optional[int] = ...) -> None: ...

class DraftTarget(_message.Message):
    __slots__ = ("name", "model_fingerprint", "unshared_ids", "tokenizer_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    UNSHARED_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_fingerprint: str
    unshared_ids: bytes
    tokenizer_fingerprint: str
    def __init__(self, name: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., unshared_ids: _Optional[bytes] = ..., tokenizer_fingerprint: _Optional[str] = ...) -> None: ...

class ProposeRequest(_message.Message):
    __slots__ = ("opens", "commits", "closes", "forget_session_ids", "heartbeat_ms", "target")
    OPENS_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    FORGET_SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    opens: _containers.RepeatedCompositeFieldContainer[DraftOpen]
    commits: _containers.RepeatedCompositeFieldContainer[DraftCommit]
    closes: _containers.RepeatedCompositeFieldContainer[DraftClose]
    forget_session_ids: _containers.RepeatedScalarFieldContainer[str]
    heartbeat_ms: int
    target: DraftTarget
    def __init__(self, opens: _Optional[_Iterable[_Union[DraftOpen, _Mapping]]] = ..., commits: _Optional[_Iterable[_Union[DraftCommit, _Mapping]]] = ..., closes: _Optional[_Iterable[_Union[DraftClose, _Mapping]]] = ..., forget_session_ids: _Optional[_Iterable[str]] = ..., heartbeat_ms: _Optional[int] = ..., target: _Optional[_Union[DraftTarget, _Mapping]] = ...) -> None: ...

class DraftOpen(_message.Message):
    __slots__ = ("generation_id", "session_id", "epoch", "token_ids", "prompt_len", "max_len", "sampling", "verification", "gamma", "lookahead", "vocab_size", "ahead_gamma", "fan_out", "traceparent", "tells_unlikely")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    AHEAD_GAMMA_FIELD_NUMBER: _ClassVar[int]
    FAN_OUT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TELLS_UNLIKELY_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    session_id: str
    epoch: int
    token_ids: bytes
    prompt_len: int
    max_len: int
    sampling: _sampling_pb2.SamplingParams
    verification: _sampling_pb2.Verification
    gamma: int
    lookahead: int
    vocab_size: int
    ahead_gamma: int
    fan_out: int
    traceparent: str
    tells_unlikely: bool
    def __init__(self, generation_id: _Optional[int] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., prompt_len: _Optional[int] = ..., max_len: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., verification: _Optional[_Union[_sampling_pb2.Verification, str]] = ..., gamma: _Optional[int] = ..., lookahead: _Optional[int] = ..., vocab_size: _Optional[int] = ..., ahead_gamma: _Optional[int] = ..., fan_out: _Optional[int] = ..., traceparent: _Optional[str] = ..., tells_unlikely: bool = ...) -> None: ...

class DraftCommit(_message.Message):
    __slots__ = ("generation_id", "token_ids", "committed_len", "gamma", "ahead_gamma")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    AHEAD_GAMMA_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    token_ids: bytes
    committed_len: int
    gamma: int
    ahead_gamma: int
    def __init__(self, generation_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., committed_len: _Optional[int] = ..., gamma: _Optional[int] = ..., ahead_gamma: _Optional[int] = ...) -> None: ...

class DraftClose(_message.Message):
    __slots__ = ("generation_id", "keep")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    keep: bool
    def __init__(self, generation_id: _Optional[int] = ..., keep: bool = ...) -> None: ...

class ProposeResponse(_message.Message):
    __slots__ = ("proposals", "errors", "costs", "state")
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    proposals: _containers.RepeatedCompositeFieldContainer[Proposal]
    errors: _containers.RepeatedCompositeFieldContainer[DraftLost]
    costs: _model_pb2.StepCosts
    state: _model_pb2.ReplicaState
    def __init__(self, proposals: _Optional[_Iterable[_Union[Proposal, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[DraftLost, _Mapping]]] = ..., costs: _Optional[_Union[_model_pb2.StepCosts, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.ReplicaState, str]] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("generation_id", "assumed_token_ids", "base_len", "token_ids", "support_sizes", "support_ids", "support_probs")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    ASSUMED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BASE_LEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_SIZES_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_PROBS_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    assumed_token_ids: bytes
    base_len: int
    token_ids: bytes
    support_sizes: bytes
    support_ids: bytes
    support_probs: bytes
    def __init__(self, generation_id: _Optional[int] = ..., assumed_token_ids: _Optional[bytes] = ..., base_len: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., support_sizes: _Optional[bytes] = ..., support_ids: _Optional[bytes] = ..., support_probs: _Optional[bytes] = ...) -> None: ...

class DraftLost(_message.Message):
    __slots__ = ("generation_id", "reason", "detail")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[DraftLost.Reason]
        REASON_KV_FULL: _ClassVar[DraftLost.Reason]
        REASON_BAD_MESSAGE: _ClassVar[DraftLost.Reason]
        REASON_DISPLACED: _ClassVar[DraftLost.Reason]
        REASON_INTERNAL: _ClassVar[DraftLost.Reason]
        REASON_DRAINING: _ClassVar[DraftLost.Reason]
    REASON_UNSPECIFIED: DraftLost.Reason
    REASON_KV_FULL: DraftLost.Reason
    REASON_BAD_MESSAGE: DraftLost.Reason
    REASON_DISPLACED: DraftLost.Reason
    REASON_INTERNAL: DraftLost.Reason
    REASON_DRAINING: DraftLost.Reason
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    reason: DraftLost.Reason
    detail: str
    def __init__(self, generation_id: _Optional[int] = ..., reason: _Optional[_Union[DraftLost.Reason, str]] = ..., detail: _Optional[str] = ...) -> None: ...
