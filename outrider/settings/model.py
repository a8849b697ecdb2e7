"""Settings of the model that a model service loads, a base class for `services`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from outrider.settings.fields import require, setting
from outrider.settings.simulation import Simulation

# Settings that a simulated tier does not take.
_MODEL_SETTINGS = (
    "revision", "dtype", "device", "device_map", "max_model_len", "num_threads", "prepack",
    "forbid_kernels", "attention_backend", "cuda_graphs", "inflate_parameters",
    "generation_config", "tokenizer_eos", "target_tokenizer", "tensor_parallel_size",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSettings:
    """Which model a service loads, and how it computes it."""

    model: str = setting("", "local directory or Hugging Face Hub name of a causal language model")
    revision: str | None = setting(
        None, "branch, tag or commit of the model on the Hugging Face Hub; unset: its main branch"
    )
    simulate: str | None = setting(
        None,
        "simulate a model with forward passes of given cost, for instance step_ms=25,row_ms=0.5",
    )
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    device_map: str | None = setting(
        None, "how to spread the layers over devices, for instance auto; unset: one device"
    )
    kv_cache_tokens: int | None = setting(
        None, "size of the KV cache in tokens; unset: from free memory"
    )
    max_model_len: int | None = setting(
        None, "maximum tokens of prompt and output together; unset: the model's context length"
    )
    num_threads: int | None = setting(None, "CPU threads of a forward pass; unset: torch's default")
    prepack: bool = setting(True, "on CPU, use each linear layer's fastest kernel, not torch's own")
    forbid_kernels: str = setting(
        "",
        "CPU kernels not to use, comma-separated: fbgemm_float16, onednn_float32, onednn_bfloat16, "
        "torch_transposed",
    )
    attention_backend: str = setting("auto", "attention kernels: auto, torch or flashinfer")
    cuda_graphs: bool = setting(
        True, "replay single-token steps from CUDA graphs where that is faster"
    )
    inflate_parameters: int | None = setting(
        None, "pad the quickstart target to the cost of a model with this many parameters"
    )
    generation_config: str = setting(
        "auto",
        "auto: take sampling defaults from generation_config.json, as vLLM does; none: do not",
    )
    tokenizer_eos: bool = setting(
        True, "end outputs at the tokenizer's own end-of-sequence token, as vLLM does"
    )

    def check_model(self, *, is_draft: bool) -> None:
        """Raises ConfigError."""
        if self.simulate is None:
            require(bool(self.model), "model", "is required: a directory or a Hub name")
        else:
            require(not self.model, "simulate", "cannot be combined with a model")
            Simulation.parse(self.simulate, is_draft=is_draft)
            for entry in fields(self):
                is_default = getattr(self, entry.name) == entry.default
                require(
                    is_default or entry.name not in _MODEL_SETTINGS,
                    entry.name,
                    "cannot be combined with simulate, which loads no model",
                )
        known = ("auto", "none")
        require(self.generation_config in known, "generation_config", "must be auto or none")
        require(self.revision != "", "revision", "is empty; give a branch, a tag or a commit")
        for name, least in (("kv_cache_tokens", 16), ("num_threads", 1), ("max_model_len", 2)):
            value = getattr(self, name)
            require(value is None or value >= least, name, f"must be {least} or more")

    @property
    def model_at_revision(self) -> str:
        """The model as `ModelSource.parse` takes it: NAME@REVISION."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"
