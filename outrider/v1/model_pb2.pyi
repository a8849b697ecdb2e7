from outrider.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_STUCK: _ClassVar[ReplicaState]
    REPLICA_STATE_FAILING: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_STUCK: ReplicaState
REPLICA_STATE_FAILING: ReplicaState

class ModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "vocab_size", "tokenizer_fingerprint", "model_fingerprint", "max_context_len", "eos_token_ids", "dtype", "device", "num_parameters", "kv_capacity_tokens", "max_gamma", "attention_backend", "linear_kernels", "cuda_graphs", "sampling_defaults", "token_hashes", "target_tokenizer_fingerprints", "tensor_parallel_size", "quantization")
    class LinearKernelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_GAMMA_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    LINEAR_KERNELS_FIELD_NUMBER: _ClassVar[int]
    CUDA_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HASHES_FIELD_NUMBER: _ClassVar[int]
    TARGET_TOKENIZER_FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    vocab_size: int
    tokenizer_fingerprint: str
    model_fingerprint: str
    max_context_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    device: str
    num_parameters: int
    kv_capacity_tokens: int
    max_gamma: int
    attention_backend: str
    linear_kernels: _containers.ScalarMap[str, int]
    cuda_graphs: bool
    sampling_defaults: _sampling_pb2.SamplingParams
    token_hashes: bytes
    target_tokenizer_fingerprints: _containers.RepeatedScalarFieldContainer[str]
    tensor_parallel_size: int
    quantization: str
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., vocab_size: _Optional[int] = ..., tokenizer_fingerprint: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., max_context_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., num_parameters: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., max_gamma: _Optional[int] = ..., attention_backend: _Optional[str] = ..., linear_kernels: _Optional[_Mapping[str, int]] = ..., cuda_graphs: bool = ..., sampling_defaults: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., token_hashes: _Optional[bytes] = ..., target_tokenizer_fingerprints: _Optional[_Iterable[str]] = ..., tensor_parallel_size: _Optional[int] = ..., quantization: _Optional[str] = ...) -> None: ...

class StepCosts(_message.Message):
    __slots__ = ("num_tokens", "step_s", "row_s", "mean_num_rows")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    ROW_S_FIELD_NUMBER: _ClassVar[int]
    MEAN_NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    step_s: _containers.RepeatedScalarFieldContainer[float]
    row_s: float
    mean_num_rows: float
    def __init__(self, num_tokens: _Optional[_Iterable[int]] = ..., step_s: _Optional[_Iterable[float]] = ..., row_s: _Optional[float] = ..., mean_num_rows: _Optional[float] = ...) -> None: ...
