from outrider.v1 import model_pb2 as _model_pb2
from outrider.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TargetServiceGetModelInfoRequest(_message.Message):
    __slots__ = ("with_token_hashes",)
    WITH_TOKEN_HASHES_FIELD_NUMBER: _ClassVar[int]
    with_token_hashes: bool
    def __init__(self, with_token_hashes: bool = ...) -> None: ...

class TargetServiceGetModelInfoResponse(_message.Message):
    __slots__ = ("model", "load", "costs", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: _model_pb2.ModelInfo
    load: TargetLoad
    costs: _model_pb2.StepCosts
    state: _model_pb2.ReplicaState
    def __init__(self, model: _Optional[_Union[_model_pb2.ModelInfo, _Mapping]] = ..., load: _Optional[_Union[TargetLoad, _Mapping]] = ..., costs: _Optional[_Union[_model_pb2.StepCosts, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.ReplicaState, str]] = ...) -> None: ...

class TargetLoad(_message.Message):
    __slots__ = ("num_open_generations", "num_idle_sessions", "num_opened_total", "num_closed_total", "kv_used_tokens", "num_waiting_rows", "num_steps_total", "num_rows_total", "num_tokens_total", "num_prefill_tokens_total", "num_prefix_queried_tokens_total", "num_prefix_hit_tokens_total", "num_preempted_total")
    NUM_OPEN_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_IDLE_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_OPENED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_CLOSED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_QUERIED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    num_open_generations: int
    num_idle_sessions: int
    num_opened_total: int
    num_closed_total: int
    kv_used_tokens: int
    num_waiting_rows: int
    num_steps_total: int
    num_rows_total: int
    num_tokens_total: int
    num_prefill_tokens_total: int
    num_prefix_queried_tokens_total: int
    num_prefix_hit_tokens_total: int
    num_preempted_total: int
    def __init__(self, num_open_generations: _Optional[int] = ..., num_idle_sessions: _Optional[int] = ..., num_opened_total: _Optional[int] = ..., num_closed_total: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., num_waiting_rows: _Optional[int] = ..., num_steps_total: _Optional[int] = ..., num_rows_total: _Optional[int] = ..., num_tokens_total: _Optional[int] = ..., num_prefill_tokens_total: _Optional[int] = ..., num_prefix_queried_tokens_total: _Optional[int] = ..., num_prefix_hit_tokens_total: _Optional[int] = ..., num_preempted_total: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("opens", "rows", "closes", "forget_session_ids", "heartbeat_ms")
    OPENS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    FORGET_SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    opens: _containers.RepeatedCompositeFieldContainer[TargetOpen]
    rows: _containers.RepeatedCompositeFieldContainer[VerifyRow]
    closes: _containers.RepeatedCompositeFieldContainer[TargetClose]
    forget_session_ids: _containers.RepeatedScalarFieldContainer[str]
    heartbeat_ms: int
    def __init__(self, opens: _Optional[_Iterable[_Union[TargetOpen, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[VerifyRow, _Mapping]]] = ..., closes: _Optional[_Iterable[_Union[TargetClose, _Mapping]]] = ..., forget_session_ids: _Optional[_Iterable[str]] = ..., heartbeat_ms: _Optional[int] = ...) -> None: ...

class TargetOpen(_message.Message):
    __slots__ = ("generation_id", "session_id", "epoch", "kept_epoch", "prompt_len", "max_len", "sampling", "priority", "preempts", "traceparent", "age_ms")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEPT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_LEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PREEMPTS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    session_id: str
    epoch: int
    kept_epoch: int
    prompt_len: int
    max_len: int
    sampling: _sampling_pb2.SamplingParams
    priority: int
    preempts: bool
    traceparent: str
    age_ms: int
    def __init__(self, generation_id: _Optional[int] = ..., session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., kept_epoch: _Optional[int] = ..., prompt_len: _Optional[int] = ..., max_len: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., preempts: bool = ..., traceparent: _Optional[str] = ..., age_ms: _Optional[int] = ...) -> None: ...

class VerifyRow(_message.Message):
    __slots__ = ("generation_id", "keep_len", "context_token_ids", "draft_token_ids", "support_sizes", "support_ids", "with_prompt_logprobs")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_LEN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_SIZES_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_IDS_FIELD_NUMBER: _ClassVar[int]
    WITH_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    keep_len: int
    context_token_ids: bytes
    draft_token_ids: bytes
    support_sizes: bytes
    support_ids: bytes
    with_prompt_logprobs: bool
    def __init__(self, generation_id: _Optional[int] = ..., keep_len: _Optional[int] = ..., context_token_ids: _Optional[bytes] = ..., draft_token_ids: _Optional[bytes] = ..., support_sizes: _Optional[bytes] = ..., support_ids: _Optional[bytes] = ..., with_prompt_logprobs: bool = ...) -> None: ...

class TargetClose(_message.Message):
    __slots__ = ("generation_id", "keep")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    keep: bool
    def __init__(self, generation_id: _Optional[int] = ..., keep: bool = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("results", "errors", "costs", "state")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[VerifyResult]
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    costs: _model_pb2.StepCosts
    state: _model_pb2.ReplicaState
    def __init__(self, results: _Optional[_Iterable[_Union[VerifyResult, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ..., costs: _Optional[_Union[_model_pb2.StepCosts, _Mapping]] = ..., state: _Optional[_Union[_model_pb2.ReplicaState, str]] = ...) -> None: ...

class VerifyResult(_message.Message):
    __slots__ = ("generation_id", "support_probs", "tail_mass", "sample_ids", "support_logprobs", "sample_logprobs", "top_ids", "top_logprobs", "step_s", "tail_logprobs", "num_reused_tokens", "num_left_out", "prompt_logprobs", "prompt_top_ids", "prompt_top_logprobs", "prompt_ranks")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_PROBS_FIELD_NUMBER: _ClassVar[int]
    TAIL_MASS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TAIL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_RANKS_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    support_probs: bytes
    tail_mass: bytes
    sample_ids: bytes
    support_logprobs: bytes
    sample_logprobs: bytes
    top_ids: bytes
    top_logprobs: bytes
    step_s: float
    tail_logprobs: bytes
    num_reused_tokens: int
    num_left_out: int
    prompt_logprobs: bytes
    prompt_top_ids: bytes
    prompt_top_logprobs: bytes
    prompt_ranks: bytes
    def __init__(self, generation_id: _Optional[int] = ..., support_probs: _Optional[bytes] = ..., tail_mass: _Optional[bytes] = ..., sample_ids: _Optional[bytes] = ..., support_logprobs: _Optional[bytes] = ..., sample_logprobs: _Optional[bytes] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., step_s: _Optional[float] = ..., tail_logprobs: _Optional[bytes] = ..., num_reused_tokens: _Optional[int] = ..., num_left_out: _Optional[int] = ..., prompt_logprobs: _Optional[bytes] = ..., prompt_top_ids: _Optional[bytes] = ..., prompt_top_logprobs: _Optional[bytes] = ..., prompt_ranks: _Optional[bytes] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("generation_id", "reason", "detail")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[RowError.Reason]
        REASON_KV_LOST: _ClassVar[RowError.Reason]
        REASON_KV_FULL: _ClassVar[RowError.Reason]
        REASON_BAD_ROW: _ClassVar[RowError.Reason]
        REASON_DISPLACED: _ClassVar[RowError.Reason]
        REASON_INTERNAL: _ClassVar[RowError.Reason]
        REASON_DRAINING: _ClassVar[RowError.Reason]
        REASON_KV_NEVER: _ClassVar[RowError.Reason]
    REASON_UNSPECIFIED: RowError.Reason
    REASON_KV_LOST: RowError.Reason
    REASON_KV_FULL: RowError.Reason
    REASON_BAD_ROW: RowError.Reason
    REASON_DISPLACED: RowError.Reason
    REASON_INTERNAL: RowError.Reason
    REASON_DRAINING: RowError.Reason
    REASON_KV_NEVER: RowError.Reason
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    generation_id: int
    reason: RowError.Reason
    detail: str
    def __init__(self, generation_id: _Optional[int] = ..., reason: _Optional[_Union[RowError.Reason, str]] = ..., detail: _Optional[str] = ...) -> None: ...
