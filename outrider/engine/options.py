"""Engine options chosen by the operator, and the description of a loaded engine. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load and serve one model."""

    model: str
    """Local directory, or name on the Hugging Face Hub."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto: the checkpoint's dtype on CUDA, float32 on CPU.

    On CPU in float32, weights that float16 holds exactly may be kept in 16 bits.
    """
    device: str = "auto"
    """auto | cpu | cuda | cuda:N. auto: CUDA if a device is present."""
    device_map: str | None = None
    """Passed to accelerate, for example "auto": layers are spread over devices, their KV with them.

    Layers run one after another (pipeline placement, not tensor parallelism).
    """
    kv_cache_tokens: int | None = None
    """KV capacity in tokens; None: derived from the memory free after loading."""
    max_model_len: int | None = None
    """Longest sequence, at most the model's context; None: the model's context."""
    max_step_tokens: int = 512
    """Tokens of the pass that is measured to derive the KV capacity."""
    num_threads: int | None = None
    """Threads per torch operation. The setting is shared by the whole process."""
    prepack: bool = True
    """On CPU, use the fastest kernel for each linear layer, with weights in its own layout."""
    forbid_kernels: frozenset[str] = frozenset()
    """CPU kernels not to use, named as in `EngineInfo.linear_kernels`."""
    attention_backend: str = "auto"
    """auto | torch | flashinfer. auto: FlashInfer on CUDA if it supports the model."""
    cuda_graphs: bool = True
    """With FlashInfer: replay single-token steps from CUDA graphs if measured to be faster."""
    tokenizer_eos_ids: tuple[int, ...] = ()
    """The tokenizer's EOS ids, used in addition to those of the model's configuration."""
    tensor_parallel_size: int = 1
    """Number of processes that each hold a part of every layer (see `parallel/`)."""
    tensor_parallel_address: str | None = None
    """host:port at which the ranks meet, if they run on other machines; None: they are started."""
    tensor_parallel_timeout_s: float = 30.0
    """The replica ends if a rank does not take part in a pass for this long."""
    inflate_parameters: int | None = None
    """Quickstart only: enlarge the model to about this many parameters, with the same outputs."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Description of a loaded engine. Sent to peers as `ModelInfo` (model.proto)."""

    name: str
    architecture: str
    vocab_size: int
    """Width of a row of logits, including a padded vocabulary's padding."""
    max_context_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    num_parameters: int
    kv_capacity_tokens: int
    model_fingerprint: str
    """SHA-256 (hex) of configuration and weights; the same for every dtype and device."""
    attention_backend: str
    """sdpa | flashinfer | none (simulated)."""
    self_test_max_difference: float
    """Self-test at load: largest |difference| of a logit from plain eager attention."""
    tensor_parallel_size: int = 1
    """Number of ranks that share the model."""
    max_step_rows: int = 1 << 20
    """Most rows of logits in one pass, from the vocabulary and the device's memory."""
    cuda_graphs: bool = False
    """Whether single-token steps are replayed from CUDA graphs."""
    linear_kernels: Mapping[str, int] = field(default_factory=dict)
    """Number of linear layers by kernel: fbgemm_float16, onednn_float32, onednn_bfloat16,
    torch_transposed, torch."""
    quantization: str = ""
    """Method of a quantised checkpoint, such as awq; empty: it is not quantised."""
