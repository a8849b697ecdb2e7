"""Device and dtype of a model, from their options."""

from __future__ import annotations

from typing import Any

import torch

from outrider.errors import ConfigError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def served_device(name: str) -> torch.device:
    """The device by its option. Raises ConfigError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device: {name!r} is unknown; expected auto, cpu, cuda or cuda:N"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} does not exist; {torch.cuda.device_count()} CUDA devices present"
        )
    return device


def served_dtype(name: str, device_type: str) -> torch.dtype | str:
    """dtype of the weights on such a device; "auto": the checkpoint's. Raises ConfigError."""
    if name != "auto" and name not in _DTYPES:
        raise ConfigError(f"dtype: {name!r} is unknown; expected auto, {', '.join(_DTYPES)}")
    return _DTYPES.get(name, torch.float32 if device_type == "cpu" else "auto")


def keep_row_index_on_cpu(module: Any) -> None:
    """Keep accelerate from moving `logits_to_keep` to the first device.

    The hidden states it selects from are on the last device; a CPU index can select from any.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        skipped = getattr(hook, "skip_keys", None) or []
        hook.skip_keys = [*([skipped] if isinstance(skipped, str) else skipped), "logits_to_keep"]
