"""Quantised checkpoints: which ones this machine can run, through transformers' own quantisers.

A quantised model serves if transformers accepts it on this machine, and its engine logits equal its
own eager logits (`self_test.py`). Its quantised layers are left as they are: `prepack` changes
plain linear layers only. Nothing here quantises a model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from outrider.errors import ModelError

_log = logging.getLogger(__name__)

# Raised by transformers' quantisers where a package or a device is missing, or for a bad field.
_REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def method(config: Any) -> str | None:
    """Name of the checkpoint's quantisation method, such as awq; None: it is not quantised."""
    fields = _fields(config)
    if fields is None:
        return None
    given = fields.get("quant_method")
    given = getattr(given, "value", given)  # an enumeration once the weights are loaded
    # Former checkpoints of bitsandbytes name no method.
    loads_bits = any(fields.get(f"load_in_{bits}bit") for bits in (4, 8))
    return str(given or ("bitsandbytes" if loads_bits else "an unnamed method"))


def check_quantization(name: str, config: Any) -> None:
    """Raises ModelError, naming the missing package or device, if it cannot be loaded here."""
    used = method(config)
    if used is None:
        return
    untyped: Any = AutoHfQuantizer
    try:
        quantizer = untyped.from_config(_fields(config), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except _REFUSALS as error:
        raise _refusal(name, used, error) from error


@contextlib.contextmanager
def naming_failures(name: str, config: Any) -> Iterator[None]:
    """Turns errors of a quantised model's first pass into a ModelError that names the method.

    Some kernels find only then that the device or a package is missing.
    """
    used = method(config)
    try:
        yield
    except _REFUSALS as error:
        if used is None:
            raise
        served = str(getattr(config, "dtype", "")).removeprefix("torch.")
        hint = f"; try the checkpoint's own dtype: --dtype {served}" if served else ""
        raise ModelError(f"{_refusal(name, used, error)}{hint}") from error


def log_loaded(name: str, stored: str | None, module: Any) -> None:
    """Logs how a checkpoint quantised with the method `stored` is served."""
    if stored is None:
        return
    if method(module.config) is None:
        dtype = str(module.dtype).removeprefix("torch.")
        _log.warning("%s: quantised with %s, expanded to %s on this device", name, stored, dtype)
    else:
        _log.info("%s: quantised with %s", name, stored)


def is_plain(module: nn.Module) -> bool:
    """Whether the module's weight is an ordinary matrix, and its `forward` its class's own.

    Quantisers also keep `nn.Linear`: torchao with a tensor subclass as its weight,
    compressed-tensors with another `forward` of the one module.
    """
    weight = module._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.is_floating_point()
        and "forward" not in vars(module)
        and not hasattr(module, "quantization_scheme")
    )


def _fields(config: Any) -> dict[str, Any] | None:
    """The checkpoint's `quantization_config` as a dictionary; None without one."""
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        fields = getattr(config.get_text_config(), "quantization_config", None)
    if fields is None:
        return None
    return dict(fields) if isinstance(fields, dict) else dict(fields.to_dict())


def _refusal(name: str, used: str, error: Exception) -> ModelError:
    why = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(f"{name}: quantised with {used}, which does not run here: {why[0][:300]}")
