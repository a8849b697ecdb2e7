"""Shape of a model, from its configuration alone: no weights are read or allocated.

Builds the model on torch's meta device and runs the checks that `load` runs before the self-test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from outrider.engine.attention.interface import ATTENTION_NAME
from outrider.engine.loading import checkpoint, placement, supported
from outrider.engine.options import EngineOptions
from outrider.errors import ModelError

_untyped: Any = transformers


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before its weights are loaded; sizes are those of `dtype`.

    `refused`: why the engine would not serve it; None: no reason was found. Sizes are 0 if they
    are not known.
    """

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    max_context_len: int
    sliding_window: int
    num_parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    refused: str | None = None


def model_shape(options: EngineOptions) -> ModelShape:
    """Shape of the model with the dtype that these options would serve.

    Takes a second, of which most is the import of transformers. Raises ModelError if there is no
    such model or its configuration cannot be read.
    """
    config = checkpoint.load_config(options.model)
    text = config.get_text_config()
    dtype, context_len = _dtype(options, text), 0
    built, refused = _Built(), None
    try:
        supported.check_config(options.model, config)
        context_len = supported.context_len(options.model, config, options.max_model_len)
        built.build(options.model, config, dtype)
    except ModelError as error:
        refused = str(error)
    return ModelShape(
        name=options.model,
        architecture=text.model_type,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=built.vocab_size or text.vocab_size,
        max_context_len=context_len,
        sliding_window=supported.longest_window(config),
        num_parameters=built.num_parameters,
        weight_bytes=built.num_parameters * dtype.itemsize,
        kv_bytes_per_token=built.kv_bytes_per_token,
        refused=refused,
    )


@dataclass
class _Built:
    """Sizes of the model on the meta device; 0: not known."""

    vocab_size: int = 0
    num_parameters: int = 0
    kv_bytes_per_token: int = 0

    def build(self, name: str, config: Any, dtype: torch.dtype) -> None:
        """Raises ModelError if the engine would refuse the model."""
        module = _on_meta(name, config, dtype)
        self.num_parameters = sum(weight.numel() for weight in module.parameters())
        output = module.get_output_embeddings()
        self.vocab_size = 0 if output is None else output.weight.shape[0]
        supported.check_interface(name, module)
        try:
            layers = supported.discover_layers(name, module)
        except RuntimeError:  # needs values, which the meta device has not: experts, for instance
            self.kv_bytes_per_token = _configured_kv_bytes(config.get_text_config(), dtype)
        else:
            self.kv_bytes_per_token = sum(layer.bytes_per_token for layer in layers)


def _configured_kv_bytes(text: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values per token by the usual fields of a configuration; 0 without them."""
    num_heads = getattr(text, "num_key_value_heads", None)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * (num_heads or 0) * dim * dtype.itemsize)


def _dtype(options: EngineOptions, text: Any) -> torch.dtype:
    """dtype of the weights when served; the device need not be present."""
    device_type = options.device.partition(":")[0]
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = placement.served_dtype(options.dtype, device_type)
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = getattr(text, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _on_meta(name: str, config: Any, dtype: torch.dtype) -> Any:
    """The model without values. Raises ModelError."""
    try:
        with torch.device("meta"), checkpoint.quiet():
            module = _untyped.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION_NAME
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if isinstance(error, KeyError) and error.args == (ATTENTION_NAME,):
            raise checkpoint.no_interface_error(name, config) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: cannot be built: {lines[0][:300]}") from error
    return module.eval()
