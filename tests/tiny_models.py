"""Tiny random models of many families, made on the spot: no download, deterministic by seed.

Their logits are peaked like a real model's and depend on the whole context, so greedy outputs
vary and have no ties. Shared by all tests that need a real model directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
_GROUPED = {**_SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 24}  # not hidden_size / heads, as in Qwen3 and Gemma
# With tied embeddings, a random Gemma repeats its last token without end.
_GEMMA = {
    **_HEADS,
    "sliding_window": 13,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}

# Family → configuration class and what differs from its defaults. Windows are 13 tokens, so
# that short tests cross them at places where no page ends.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama3_rope": ("LlamaConfig", {**_GROUPED, "rope_parameters": _LLAMA3_ROPE}),
    "llama_yarn": ("LlamaConfig", {**_GROUPED, "rope_parameters": _YARN_ROPE}),
    "qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2Config",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _HEADS),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "mistral_window": ("MistralConfig", {**_GROUPED, "sliding_window": 13}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "rope_parameters": _GEMMA3_ROPE}),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": 13}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_positions": 512}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_model_type(family: str) -> str:
    """transformers' `model_type` of a family."""
    return str(getattr(transformers, _CONFIGS[family][0]).model_type)


# Standard deviation of the logits: peaked like a real model's.
LOGIT_STD = 5.0


def make_tiny_model(
    family: str,
    directory: Path,
    *,
    vocab_size: int = 256,
    seed: int = 0,
    num_layers: int = 2,
    scale: float = 1.0,
    **overrides: Any,
) -> Path:
    """Saves a random float32 model of the family to `directory`, and returns it.

    scale: of the logits; 2.0 makes them twice as peaked. The end-of-sequence token is the last
    one of the vocabulary. overrides: further fields of the configuration.
    """
    model = build_tiny_model(
        family, vocab_size=vocab_size, seed=seed, num_layers=num_layers, **overrides
    )
    _peak(model, scale * LOGIT_STD)
    return _save(model, directory)


def build_tiny_model(
    family: str, *, vocab_size: int = 256, seed: int = 0, num_layers: int = 2, **overrides: Any
) -> Any:
    """The random model itself, before its logits are scaled."""
    config_class, fields = _CONFIGS[family]
    fields = {
        **fields,
        "vocab_size": vocab_size,
        "num_hidden_layers": num_layers,
        "eos_token_id": vocab_size - 1,
        "bos_token_id": 0,
        "pad_token_id": None,
        "initializer_range": 0.2,
        **overrides,
    }
    if fields.get("sliding_window") and family in ("gemma2", "gemma3"):
        kinds = ("sliding_attention", "full_attention")
        fields.setdefault("layer_types", [kinds[i % 2] for i in range(num_layers)])
    config = getattr(transformers, config_class)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config).eval()


def make_tiny_draft(
    target_dir: Path,
    directory: Path,
    *,
    seed: int = 1,
    noise: float = 0.02,
    vocab_size: int | None = None,
) -> Path:
    """Saves a draft for the target: its weights with relative `noise`, so it mostly agrees.

    vocab_size: cut the vocabulary off, or pad it with random tokens, to this size.
    """
    with _no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * noise * weight.std())
    if vocab_size is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
    return _save(model, directory)


def rounded(source: Path, directory: Path, dtype: torch.dtype) -> Path:
    """Saves a copy of the model whose checkpoint has this dtype."""
    with _no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return _save(model, directory)


@torch.no_grad()
def _peak(model: Any, std: float) -> None:
    """Scales the final norm so that logits (before any final soft-cap) have this deviation."""
    config = model.config
    ids = torch.arange(min(config.vocab_size, 128))[None]
    cap = getattr(config, "final_logit_softcapping", None)
    config.final_logit_softcapping = None
    factor = std / float(model(ids, use_cache=False).logits.std())
    config.final_logit_softcapping = cap
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    if config.model_type.startswith("gemma"):  # their norms multiply by 1 + weight
        norm.weight.copy_((1 + norm.weight) * factor - 1)
    else:
        norm.weight.mul_(factor)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factor)


def _save(model: Any, directory: Path) -> Path:
    with _no_progress_bars():
        model.save_pretrained(directory)
    return directory


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logs: Any = transformers.utils.logging
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.enable_progress_bar()
