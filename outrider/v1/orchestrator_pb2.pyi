from outrider.v1 import model_pb2 as _model_pb2
from outrider.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_SOURCE_UNSPECIFIED: _ClassVar[DraftSource]
    DRAFT_SOURCE_AUTO: _ClassVar[DraftSource]
    DRAFT_SOURCE_MODEL: _ClassVar[DraftSource]
    DRAFT_SOURCE_LOOKUP: _ClassVar[DraftSource]
    DRAFT_SOURCE_NONE: _ClassVar[DraftSource]
    DRAFT_SOURCE_GRAMMAR: _ClassVar[DraftSource]

class DraftWait(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_WAIT_UNSPECIFIED: _ClassVar[DraftWait]
    DRAFT_WAIT_ADAPTIVE: _ClassVar[DraftWait]
    DRAFT_WAIT_ALWAYS: _ClassVar[DraftWait]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_DURABLE: _ClassVar[Durability]
    DURABILITY_FAST: _ClassVar[Durability]

class TokenOrigin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_ORIGIN_UNSPECIFIED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_ACCEPTED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_RECOVERED: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_BONUS: _ClassVar[TokenOrigin]
    TOKEN_ORIGIN_PLAIN: _ClassVar[TokenOrigin]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]

class DraftRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_ROLE_UNSPECIFIED: _ClassVar[DraftRole]
    DRAFT_ROLE_CURRENT: _ClassVar[DraftRole]
    DRAFT_ROLE_CANARY: _ClassVar[DraftRole]
    DRAFT_ROLE_CONTROL: _ClassVar[DraftRole]
    DRAFT_ROLE_WAITING: _ClassVar[DraftRole]
    DRAFT_ROLE_SUPERSEDED: _ClassVar[DraftRole]
    DRAFT_ROLE_ROLLED_BACK: _ClassVar[DraftRole]
DRAFT_SOURCE_UNSPECIFIED: DraftSource
DRAFT_SOURCE_AUTO: DraftSource
DRAFT_SOURCE_MODEL: DraftSource
DRAFT_SOURCE_LOOKUP: DraftSource
DRAFT_SOURCE_NONE: DraftSource
DRAFT_SOURCE_GRAMMAR: DraftSource
DRAFT_WAIT_UNSPECIFIED: DraftWait
DRAFT_WAIT_ADAPTIVE: DraftWait
DRAFT_WAIT_ALWAYS: DraftWait
DURABILITY_UNSPECIFIED: Durability
DURABILITY_DURABLE: Durability
DURABILITY_FAST: Durability
TOKEN_ORIGIN_UNSPECIFIED: TokenOrigin
TOKEN_ORIGIN_ACCEPTED: TokenOrigin
TOKEN_ORIGIN_RECOVERED: TokenOrigin
TOKEN_ORIGIN_BONUS: TokenOrigin
TOKEN_ORIGIN_PLAIN: TokenOrigin
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
DRAFT_ROLE_UNSPECIFIED: DraftRole
DRAFT_ROLE_CURRENT: DraftRole
DRAFT_ROLE_CANARY: DraftRole
DRAFT_ROLE_CONTROL: DraftRole
DRAFT_ROLE_WAITING: DraftRole
DRAFT_ROLE_SUPERSEDED: DraftRole
DRAFT_ROLE_ROLLED_BACK: DraftRole

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "parts", "name", "tool_calls", "tool_call_id", "reasoning_content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
    REASONING_CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    parts: _containers.RepeatedCompositeFieldContainer[ContentPart]
    name: str
    tool_calls: _containers.RepeatedCompositeFieldContainer[ToolCall]
    tool_call_id: str
    reasoning_content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[ContentPart, _Mapping]]] = ..., name: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[ToolCall, _Mapping]]] = ..., tool_call_id: _Optional[str] = ..., reasoning_content: _Optional[str] = ...) -> None: ...

class ContentPart(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("id", "name", "arguments")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    arguments: str
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_KWARGS_FIELD_NUMBER: _ClassVar[int]
    ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    tools: _containers.RepeatedScalarFieldContainer[str]
    chat_template_kwargs: str
    add_generation_prompt: bool
    continue_final_message: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., tools: _Optional[_Iterable[str]] = ..., chat_template_kwargs: _Optional[str] = ..., add_generation_prompt: bool = ..., continue_final_message: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("text", "token_ids", "chat", "sampling", "gamma", "verification", "session_id", "create_session", "lookahead", "fan_out", "resume_from", "durability", "priority", "heartbeat_ms", "draft_wait", "draft_source", "add_special_tokens", "truncate_prompt_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_SESSION_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_FIELD_NUMBER: _ClassVar[int]
    FAN_OUT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WAIT_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    chat: ChatMessages
    sampling: _sampling_pb2.SamplingParams
    gamma: int
    verification: _sampling_pb2.Verification
    session_id: str
    create_session: bool
    lookahead: int
    fan_out: int
    resume_from: int
    durability: Durability
    priority: int
    heartbeat_ms: int
    draft_wait: DraftWait
    draft_source: DraftSource
    add_special_tokens: bool
    truncate_prompt_tokens: int
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., gamma: _Optional[int] = ..., verification: _Optional[_Union[_sampling_pb2.Verification, str]] = ..., session_id: _Optional[str] = ..., create_session: bool = ..., lookahead: _Optional[int] = ..., fan_out: _Optional[int] = ..., resume_from: _Optional[int] = ..., durability: _Optional[_Union[Durability, str]] = ..., priority: _Optional[int] = ..., heartbeat_ms: _Optional[int] = ..., draft_wait: _Optional[_Union[DraftWait, str]] = ..., draft_source: _Optional[_Union[DraftSource, str]] = ..., add_special_tokens: bool = ..., truncate_prompt_tokens: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("session_id", "token_ids", "text", "origins", "logprobs", "result", "text_ends", "prompt_logprobs")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    TEXT_ENDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    origins: _containers.RepeatedScalarFieldContainer[TokenOrigin]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    result: GenerateResult
    text_ends: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: PromptLogprobs
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., origins: _Optional[_Iterable[_Union[TokenOrigin, str]]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., result: _Optional[_Union[GenerateResult, _Mapping]] = ..., text_ends: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("token_ids", "logprobs", "num_top", "top_ids", "top_logprobs", "ranks")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    num_top: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., num_top: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateResult(_message.Message):
    __slots__ = ("finish_reason", "stop_text", "stop_token_id", "eos_token_id", "usage", "speculation", "seed", "recorded", "interrupted_answer_tokens")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TEXT_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    INTERRUPTED_ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    stop_text: str
    stop_token_id: int
    eos_token_id: int
    usage: Usage
    speculation: SpeculationStats
    seed: int
    recorded: bool
    interrupted_answer_tokens: int
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_text: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., eos_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., speculation: _Optional[_Union[SpeculationStats, _Mapping]] = ..., seed: _Optional[int] = ..., recorded: bool = ..., interrupted_answer_tokens: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class SpeculationStats(_message.Message):
    __slots__ = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos", "acceptance_rate", "mean_acceptance_length", "num_rounds", "time_to_first_token_s", "duration_s", "tokens_per_s", "gamma", "verification", "draft_wire_bytes", "target_wire_bytes", "num_lookahead_hits", "num_rejected_tokens", "num_rounds_per_gamma", "target_step_s", "verify_s", "draft_wait_s", "decision", "sources")
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_PER_POS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_RATE_FIELD_NUMBER: _ClassVar[int]
    MEAN_ACCEPTANCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TARGET_WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOOKAHEAD_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_PER_GAMMA_FIELD_NUMBER: _ClassVar[int]
    TARGET_STEP_S_FIELD_NUMBER: _ClassVar[int]
    VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: _containers.RepeatedScalarFieldContainer[int]
    acceptance_rate: float
    mean_acceptance_length: float
    num_rounds: int
    time_to_first_token_s: float
    duration_s: float
    tokens_per_s: float
    gamma: int
    verification: _sampling_pb2.Verification
    draft_wire_bytes: int
    target_wire_bytes: int
    num_lookahead_hits: int
    num_rejected_tokens: int
    num_rounds_per_gamma: _containers.RepeatedScalarFieldContainer[int]
    target_step_s: float
    verify_s: float
    draft_wait_s: float
    decision: GammaDecision
    sources: _containers.RepeatedCompositeFieldContainer[SourceStats]
    def __init__(self, num_drafts: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_accepted_tokens_per_pos: _Optional[_Iterable[int]] = ..., acceptance_rate: _Optional[float] = ..., mean_acceptance_length: _Optional[float] = ..., num_rounds: _Optional[int] = ..., time_to_first_token_s: _Optional[float] = ..., duration_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., gamma: _Optional[int] = ..., verification: _Optional[_Union[_sampling_pb2.Verification, str]] = ..., draft_wire_bytes: _Optional[int] = ..., target_wire_bytes: _Optional[int] = ..., num_lookahead_hits: _Optional[int] = ..., num_rejected_tokens: _Optional[int] = ..., num_rounds_per_gamma: _Optional[_Iterable[int]] = ..., target_step_s: _Optional[float] = ..., verify_s: _Optional[float] = ..., draft_wait_s: _Optional[float] = ..., decision: _Optional[_Union[GammaDecision, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[SourceStats, _Mapping]]] = ...) -> None: ...

class SourceStats(_message.Message):
    __slots__ = ("source", "num_rounds_by_reason", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_rejected_tokens", "acceptance_rate", "expected_tokens_per_s")
    class NumRoundsByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_RATE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    source: DraftSource
    num_rounds_by_reason: _containers.ScalarMap[str, int]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_rejected_tokens: int
    acceptance_rate: float
    expected_tokens_per_s: float
    def __init__(self, source: _Optional[_Union[DraftSource, str]] = ..., num_rounds_by_reason: _Optional[_Mapping[str, int]] = ..., num_drafts: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_rejected_tokens: _Optional[int] = ..., acceptance_rate: _Optional[float] = ..., expected_tokens_per_s: _Optional[float] = ...) -> None: ...

class GammaDecision(_message.Message):
    __slots__ = ("gamma", "waiting_gamma", "is_fixed", "survival", "target_step_s", "mean_num_rows", "draft_step_s", "draft_overhead_s", "target_overhead_s", "lookahead_hit_rate", "tokens_per_s", "waiting_tokens_per_s")
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    WAITING_GAMMA_FIELD_NUMBER: _ClassVar[int]
    IS_FIXED_FIELD_NUMBER: _ClassVar[int]
    SURVIVAL_FIELD_NUMBER: _ClassVar[int]
    TARGET_STEP_S_FIELD_NUMBER: _ClassVar[int]
    MEAN_NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_STEP_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_OVERHEAD_S_FIELD_NUMBER: _ClassVar[int]
    TARGET_OVERHEAD_S_FIELD_NUMBER: _ClassVar[int]
    LOOKAHEAD_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    gamma: int
    waiting_gamma: int
    is_fixed: bool
    survival: _containers.RepeatedScalarFieldContainer[float]
    target_step_s: _containers.RepeatedScalarFieldContainer[float]
    mean_num_rows: float
    draft_step_s: float
    draft_overhead_s: float
    target_overhead_s: float
    lookahead_hit_rate: float
    tokens_per_s: _containers.RepeatedScalarFieldContainer[float]
    waiting_tokens_per_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, gamma: _Optional[int] = ..., waiting_gamma: _Optional[int] = ..., is_fixed: bool = ..., survival: _Optional[_Iterable[float]] = ..., target_step_s: _Optional[_Iterable[float]] = ..., mean_num_rows: _Optional[float] = ..., draft_step_s: _Optional[float] = ..., draft_overhead_s: _Optional[float] = ..., target_overhead_s: _Optional[float] = ..., lookahead_hit_rate: _Optional[float] = ..., tokens_per_s: _Optional[_Iterable[float]] = ..., waiting_tokens_per_s: _Optional[_Iterable[float]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session_id", "token_ids", "in_use", "epoch", "num_turns", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_emitted_tokens", "target_kv", "draft_kv", "expires_in_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_KV_FIELD_NUMBER: _ClassVar[int]
    DRAFT_KV_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    in_use: bool
    epoch: int
    num_turns: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_emitted_tokens: int
    target_kv: KvHandle
    draft_kv: KvHandle
    expires_in_s: float
    def __init__(self, session_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., in_use: bool = ..., epoch: _Optional[int] = ..., num_turns: _Optional[int] = ..., num_drafts: _Optional[int] = ..., num_draft_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_emitted_tokens: _Optional[int] = ..., target_kv: _Optional[_Union[KvHandle, _Mapping]] = ..., draft_kv: _Optional[_Union[KvHandle, _Mapping]] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class KvHandle(_message.Message):
    __slots__ = ("replica", "epoch", "cached_len")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CACHED_LEN_FIELD_NUMBER: _ClassVar[int]
    replica: str
    epoch: int
    cached_len: int
    def __init__(self, replica: _Optional[str] = ..., epoch: _Optional[int] = ..., cached_len: _Optional[int] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_token",)
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_token: str
    def __init__(self, page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token", "num_unreadable")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionSummary]
    next_page_token: str
    num_unreadable: int
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., num_unreadable: _Optional[int] = ...) -> None: ...

class SessionSummary(_message.Message):
    __slots__ = ("session_id", "num_tokens", "num_turns", "in_use", "expires_in_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    num_tokens: int
    num_turns: int
    in_use: bool
    expires_in_s: float
    def __init__(self, session_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_turns: _Optional[int] = ..., in_use: bool = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ("with_token_hashes",)
    WITH_TOKEN_HASHES_FIELD_NUMBER: _ClassVar[int]
    with_token_hashes: bool
    def __init__(self, with_token_hashes: bool = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("target", "draft", "default_gamma", "max_gamma", "draft_pairing", "draft_rollout")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GAMMA_FIELD_NUMBER: _ClassVar[int]
    MAX_GAMMA_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PAIRING_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    target: _model_pb2.ModelInfo
    draft: _model_pb2.ModelInfo
    default_gamma: int
    max_gamma: int
    draft_pairing: DraftPairing
    draft_rollout: DraftRollout
    def __init__(self, target: _Optional[_Union[_model_pb2.ModelInfo, _Mapping]] = ..., draft: _Optional[_Union[_model_pb2.ModelInfo, _Mapping]] = ..., default_gamma: _Optional[int] = ..., max_gamma: _Optional[int] = ..., draft_pairing: _Optional[_Union[DraftPairing, _Mapping]] = ..., draft_rollout: _Optional[_Union[DraftRollout, _Mapping]] = ...) -> None: ...

class DraftRollout(_message.Message):
    __slots__ = ("version", "revisions", "decision")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    version: int
    revisions: _containers.RepeatedCompositeFieldContainer[DraftRevision]
    decision: str
    def __init__(self, version: _Optional[int] = ..., revisions: _Optional[_Iterable[_Union[DraftRevision, _Mapping]]] = ..., decision: _Optional[str] = ...) -> None: ...

class DraftRevision(_message.Message):
    __slots__ = ("revision", "model", "role", "num_replicas", "num_generations", "acceptance_rate")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_RATE_FIELD_NUMBER: _ClassVar[int]
    revision: str
    model: str
    role: DraftRole
    num_replicas: int
    num_generations: int
    acceptance_rate: float
    def __init__(self, revision: _Optional[str] = ..., model: _Optional[str] = ..., role: _Optional[_Union[DraftRole, str]] = ..., num_replicas: _Optional[int] = ..., num_generations: _Optional[int] = ..., acceptance_rate: _Optional[float] = ...) -> None: ...

class DraftPairing(_message.Message):
    __slots__ = ("num_differing_ids", "is_assumed", "refused", "is_reencoded")
    NUM_DIFFERING_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_ASSUMED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    IS_REENCODED_FIELD_NUMBER: _ClassVar[int]
    num_differing_ids: int
    is_assumed: bool
    refused: str
    is_reencoded: bool
    def __init__(self, num_differing_ids: _Optional[int] = ..., is_assumed: bool = ..., refused: _Optional[str] = ..., is_reencoded: bool = ...) -> None: ...

class GetAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetAuditResponse(_message.Message):
    __slots__ = ("share", "tolerance", "num_generations", "num_dropped", "num_tokens", "num_near_ties", "max_gap", "tests", "failures", "planted_bias")
    class NumGenerationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class NumDroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_NEAR_TIES_FIELD_NUMBER: _ClassVar[int]
    MAX_GAP_FIELD_NUMBER: _ClassVar[int]
    TESTS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    PLANTED_BIAS_FIELD_NUMBER: _ClassVar[int]
    share: float
    tolerance: float
    num_generations: _containers.ScalarMap[str, int]
    num_dropped: _containers.ScalarMap[str, int]
    num_tokens: int
    num_near_ties: int
    max_gap: float
    tests: _containers.RepeatedCompositeFieldContainer[AuditTest]
    failures: _containers.RepeatedCompositeFieldContainer[AuditFailure]
    planted_bias: float
    def __init__(self, share: _Optional[float] = ..., tolerance: _Optional[float] = ..., num_generations: _Optional[_Mapping[str, int]] = ..., num_dropped: _Optional[_Mapping[str, int]] = ..., num_tokens: _Optional[int] = ..., num_near_ties: _Optional[int] = ..., max_gap: _Optional[float] = ..., tests: _Optional[_Iterable[_Union[AuditTest, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[AuditFailure, _Mapping]]] = ..., planted_bias: _Optional[float] = ...) -> None: ...

class AuditTest(_message.Message):
    __slots__ = ("name", "num_trials", "age_s", "observed", "expected", "log_evidence", "max_log_evidence", "alarm_log_evidence", "num_alarms", "false_alarm_probability", "period_s", "expected_trials")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_TRIALS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    LOG_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_LOG_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    ALARM_LOG_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_ALARMS_FIELD_NUMBER: _ClassVar[int]
    FALSE_ALARM_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PERIOD_S_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TRIALS_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, name: _Optional[str] = ..., num_trials: _Optional[int] = ..., age_s: _Optional[float] = ..., observed: _Optional[float] = ..., expected: _Optional[float] = ..., log_evidence: _Optional[float] = ..., max_log_evidence: _Optional[float] = ..., alarm_log_evidence: _Optional[float] = ..., num_alarms: _Optional[int] = ..., false_alarm_probability: _Optional[float] = ..., period_s: _Optional[float] = ..., expected_trials: _Optional[float] = ...) -> None: ...

class AuditFailure(_message.Message):
    __slots__ = ("time_s", "session_id", "verification", "index", "prompt_len", "gap", "num_differing_tokens", "replicas", "rerun_replica", "token_id", "expected_id")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    NUM_DIFFERING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RERUN_REPLICA_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ID_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    session_id: str
    verification: str
    index: int
    prompt_len: int
    gap: float
    num_differing_tokens: int
    replicas: _containers.RepeatedScalarFieldContainer[str]
    rerun_replica: str
    token_id: int
    expected_id: int
    def __init__(self, time_s: _Optional[float] = ..., session_id: _Optional[str] = ..., verification: _Optional[str] = ..., index: _Optional[int] = ..., prompt_len: _Optional[int] = ..., gap: _Optional[float] = ..., num_differing_tokens: _Optional[int] = ..., replicas: _Optional[_Iterable[str]] = ..., rerun_replica: _Optional[str] = ..., token_id: _Optional[int] = ..., expected_id: _Optional[int] = ...) -> None: ...
