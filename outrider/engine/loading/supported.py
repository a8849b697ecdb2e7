"""Supported features: refuses, at load, models that this engine would serve incorrectly.

Some models would run and be wrong: they ignore the attention interface, or attend in chunks. Most
are found by their configuration. A pass over a single token finds the others, and the shapes of
keys and values. Positions are treated in `rope.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from outrider.engine.attention.interface import (
    ATTENTION_NAME,
    AttentionStub,
    LayerCall,
    attending,
)
from outrider.engine.kv.store import LayerLayout
from outrider.engine.loading import quantized
from outrider.engine.loading.checkpoint import no_interface_error
from outrider.errors import ConfigError, ModelError

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Their `factor` is the ratio of the context length to the trained length.
_ROPE_TYPES_SCALED = {"yarn", "linear", "dynamic"}

# Tensors that models pass to every attention function and that carry no extra information.
_HARMLESS = {"position_ids", "cache_position"}


def check_config(name: str, config: Any) -> None:
    """Raises ModelError for a configuration that would be served incorrectly, or not here."""
    quantized.check_quantization(name, config)
    text = config.get_text_config()
    unknown = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise ModelError(f"{name}: {text.model_type} has {', '.join(sorted(unknown))} layers; "
                         "only full and sliding attention are supported")  # fmt: skip


def check_interface(name: str, model: Any) -> None:
    """Raises ModelError if transformers did not accept our attention for this model."""
    if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise no_interface_error(name, model.config)


def context_len(name: str, config: Any, max_model_len: int | None = None) -> int:
    """Longest sequence to serve: the model's context length, or `max_model_len`; as in vLLM.

    Raises ModelError if the configuration has no context length, ConfigError if `max_model_len`
    exceeds it.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"{name}: the configuration of {text.model_type} has no context length")
    length = _scaled(length, text)
    if max_model_len is None:
        return length
    if max_model_len > length:
        raise ConfigError(f"max_model_len: {max_model_len} exceeds the context of {name}, {length}")
    return max_model_len


def _scaled(length: int, text: Any) -> int:
    """Context length with rope scaling, which extends `max_position_embeddings`."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return length
    rope_type = parameters.get("rope_type")
    # Gemma 3 and Llama 3 give the scaled length already.
    if rope_type not in _ROPE_TYPES_SCALED or "gemma3" in text.model_type:
        return length
    if rope_type == "yarn":
        length = parameters.get("original_max_position_embeddings") or length
    return int(length * float(parameters.get("factor") or 1.0))


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Sliding window per layer, from the configuration (some models do not pass it on)."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def longest_window(config: Any) -> int:
    """Sliding window in tokens; 0 if every layer attends to everything."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) else 0


def discover_layers(name: str, model: Any) -> list[LayerLayout]:
    """KV layout of each layer, found with a pass over one token. Raises ModelError."""
    layouts: dict[int, LayerLayout] = {}
    num_calls = 0

    def add_layout(
        module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> None:
        nonlocal num_calls
        num_calls += 1
        layouts[_checked_layer(name, module, call)] = LayerLayout(
            key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device
        )

    device = model.get_input_embeddings().weight.device
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with torch.inference_mode(), attending(AttentionStub(add_layout)):
            model(input_ids=zero, position_ids=zero, use_cache=False)
    except (AttributeError, TypeError) as error:  # of a model that needs a mask, such as MPT
        if num_calls or quantized.method(model.config):
            raise
        raise no_interface_error(name, model.config, error) from error
    if not num_calls:
        raise no_interface_error(name, model.config)
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(layouts) != list(range(expected)) or num_calls != expected:
        raise ModelError(f"{name}: {model.config.model_type} has {expected} layers; "
                         f"{len(layouts)} of them called this engine's attention, "
                         f"{num_calls} times in total")  # fmt: skip
    return [layouts[layer] for layer in range(expected)]


def _checked_layer(name: str, module: torch.nn.Module, call: LayerCall) -> int:
    """Layer index of an attention call. Raises ModelError for a call we would compute wrongly."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelError(f"{name}: {type(module).__name__} has no layer_idx")
    if getattr(module, "is_causal", True) is False or call.others.get("is_causal") is False:
        raise ModelError(f"{name}: {type(module).__name__} is not causal")
    for argument, given in call.others.items():
        if isinstance(given, torch.Tensor) and argument not in _HARMLESS:
            raise ModelError(f"{name}: {type(module).__name__} passes {argument!r} to "
                             "attention, which this engine does not support")  # fmt: skip
    return layer
