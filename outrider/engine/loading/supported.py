"""What this engine cannot serve correctly is refused when it is loaded, by name.

Some models would run and be wrong: they ignore the attention interface, attend in chunks, or
turn positions by the batch's longest sequence. The configuration tells of most; a probe with a
single token finds the rest, and with it the shapes of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from outrider.engine.attention.interface import ATTENTION_NAME, LayerCall, attending
from outrider.engine.kv.store import LayerLayout
from outrider.engine.loading.checkpoint import no_interface
from outrider.errors import ConfigError, ModelError

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Their angles depend on the longest position in the batch, which is another sequence's.
_ROPE_TYPES_REFUSED = {"dynamic", "longrope"}

# Their `factor` tells how much longer the context is than it was in training.
_ROPE_TYPES_SCALED = {"yarn", "linear"}

# Tensors that models hand on to every attention function and that say nothing new.
_HARMLESS = {"position_ids", "cache_position"}


def check_config(name: str, config: Any) -> None:
    """Raises ModelError for a configuration that would be served wrongly."""
    text = config.get_text_config()
    unknown = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise ModelError(f"{name}: {text.model_type} has {', '.join(sorted(unknown))} layers, "
                         "and this engine knows only full and sliding attention")  # fmt: skip
    for rope_type in _rope_types(getattr(text, "rope_parameters", None)):
        if rope_type in _ROPE_TYPES_REFUSED:
            raise ModelError(f"{name}: rope type {rope_type!r} depends on the longest sequence "
                             "of a batch, so that sequences would change each other")  # fmt: skip


def check_interface(name: str, model: Any) -> None:
    """Raises ModelError if transformers did not take our attention for this model."""
    if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise no_interface(name, model.config)


def context_len(name: str, config: Any, max_model_len: int | None = None) -> int:
    """The longest sequence that is served, at most what the model is made for, as in vLLM.

    Raises ModelError if the model does not say, ConfigError if `max_model_len` exceeds it.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"{name}: {text.model_type} does not say how long its context is")
    length = _scaled(length, text)
    if max_model_len is None:
        return length
    if max_model_len > length:
        raise ConfigError(f"max_model_len: {max_model_len} exceeds the context of {name}, {length}")
    return max_model_len


def _scaled(length: int, text: Any) -> int:
    """With rope scaling the context is longer than `max_position_embeddings` says."""
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return length
    rope_type = parameters.get("rope_type")
    # Gemma 3 and Llama 3 say the scaled length.
    if rope_type not in _ROPE_TYPES_SCALED or "gemma3" in text.model_type:
        return length
    if rope_type == "yarn":
        length = parameters.get("original_max_position_embeddings") or length
    return int(length * float(parameters.get("factor") or 1.0))


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Per layer, the window by the configuration (some models do not pass it on)."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def longest_window(config: Any) -> int:
    """Tokens that some layer sees at most; 0 where all see everything."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) else 0


def discover_layers(name: str, model: Any) -> list[LayerLayout]:
    """What each layer keeps per token, seen in a pass over one token. Raises ModelError."""
    recorder = _Recorder(name)
    device = model.get_input_embeddings().weight.device
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode(), attending(recorder):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    if not recorder.num_calls:
        raise no_interface(name, model.config)
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(recorder.layouts) != list(range(expected)) or recorder.num_calls != expected:
        raise ModelError(f"{name}: {model.config.model_type} has {expected} layers, of which "
                         f"{len(recorder.layouts)} called this engine's attention "
                         f"{recorder.num_calls} times in all")  # fmt: skip
    return [recorder.layouts[layer] for layer in range(expected)]


class _Recorder:
    """Stands in for attention: notes what it is called with and answers zeros."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.layouts: dict[int, LayerLayout] = {}
        self.num_calls = 0

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        self.num_calls += 1
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelError(f"{self._name}: {type(module).__name__} has no layer_idx")
        if getattr(module, "is_causal", True) is False or call.others.get("is_causal") is False:
            raise ModelError(f"{self._name}: {type(module).__name__} is not causal")
        for argument, given in call.others.items():
            if isinstance(given, torch.Tensor) and argument not in _HARMLESS:
                raise ModelError(f"{self._name}: {type(module).__name__} passes {argument!r} to "
                                 "attention, which this engine does not know")  # fmt: skip
        self.layouts[layer] = LayerLayout(
            key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _rope_types(parameters: Any) -> Iterator[str]:
    """The rope types in `rope_parameters`: one set of them, or one per layer type."""
    if isinstance(parameters, dict):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)
