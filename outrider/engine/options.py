"""What the operator chooses about an engine, and what a loaded engine says about itself.

Plain data: this module knows neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to load and serve one model."""

    model: str
    """A local directory, or a name on the Hugging Face hub."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto: the checkpoint's on CUDA, float32 on CPU."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N. auto: CUDA when there is a device."""
    device_map: str | None = None
    """For instance "auto": accelerate spreads the layers over devices; keys and values follow."""
    kv_cache_tokens: int | None = None
    """Tokens to hold keys and values for; None: from the memory that is free after loading."""
    max_model_len: int | None = None
    """Longest sequence, at most the model's context; None: the model's context."""
    num_threads: int | None = None
    """Threads torch uses inside one operation (the whole process shares the setting)."""
    prepack: bool = True
    """On CPU, lay the weights of linear layers out for oneDNN once instead of at every call."""
    forbid_kernels: frozenset[str] = frozenset()
    """Names of prepacked CPU kernels not to use, as `EngineInfo.linear_kernels` reports them."""
    attention_backend: str = "auto"
    """auto | torch | flashinfer. auto: FlashInfer on CUDA where it can serve the model."""
    cuda_graphs: bool = True
    """With FlashInfer: replay single-token steps from CUDA graphs if that is faster here."""
    tokenizer_eos_ids: tuple[int, ...] = ()
    """The tokenizer's own end token: it ends outputs beside those of the model's configuration."""
    inflate_parameters: int | None = None
    """Quickstart only: grow the model to about this many parameters, with the same outputs."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine is. The counterpart on the wire is `ModelInfo` in model.proto."""

    name: str
    architecture: str
    vocab_size: int
    """Width of a row of logits (a padded vocabulary counts its padding)."""
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
    probe_max_difference: float
    """Largest |difference| of a logit between this engine and plain eager attention, at load."""
    cuda_graphs: bool = False
    """Single-token steps are replayed from CUDA graphs."""
    linear_kernels: Mapping[str, int] = field(default_factory=dict)
    """Number of linear layers by kernel: onednn_float32, onednn_bfloat16, torch."""
