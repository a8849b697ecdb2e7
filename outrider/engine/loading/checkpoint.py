"""Checkpoint loading: from a local path or Hub name to a transformers model, or a ModelError.

Translates the errors of transformers and the Hugging Face Hub. Never runs code of a model's
repository (`trust_remote_code`). What the engine supports is checked in `supported.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from outrider.engine.parallel.group import whole
from outrider.errors import ModelError
from outrider.model_source import ModelSource

_log = logging.getLogger(__name__)

# transformers' annotations are partial, and wrong about what from_pretrained returns.
_untyped: Any = transformers

# Raised by transformers for checkpoints that are absent, malformed or of another kind.
_LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip

_CAUSAL = ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# Elements of each weight that enter the fingerprint.
_FINGERPRINT_SAMPLES = 64
_NOT_FINGERPRINTED = (
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "distributed_config",
)  # fmt: skip


def load_config(name: str) -> Any:
    """Configuration of a causal language model: a directory, or NAME@REVISION on the Hub.

    Raises ModelError, and ConfigError for a revision of a directory.
    """
    source, local = _located(name)
    try:
        with quiet():
            _check_code(name, source, local)
            config = _untyped.AutoConfig.from_pretrained(
                source.name,
                revision=source.revision,
                local_files_only=local,
                trust_remote_code=False,
            )
    except _LOAD_ERRORS as error:
        raise _as_model_error(name, source, local, "its configuration", error) from error
    if commit := getattr(config, "_commit_hash", None):
        _log.info("%s is commit %s on the Hugging Face Hub", name, commit)
    architectures = getattr(config, "architectures", None) or []
    causal = [a for a in architectures if a.endswith(_CAUSAL_SUFFIXES)]
    if getattr(config, "is_encoder_decoder", False) or (architectures and not causal):
        kind = ", ".join(architectures) or config.model_type
        raise ModelError(f"{name}: {kind} is not a causal language model")
    return config


def load_weights(
    name: str,
    config: Any,
    *,
    dtype: torch.dtype | str,
    attention: str,
    device_map: str | None,
    tensor_parallel_size: int = 1,
) -> Any:
    """Model in evaluation mode, on CPU unless `device_map` is given. Raises ModelError.

    With tensor parallelism: this rank's part of it, on this rank's device.
    """
    source, local = _located(name)
    placement: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if tensor_parallel_size > 1:
        from transformers import distributed  # imports much of torch

        config_class: Any = distributed.configuration_utils.DistributedConfig
        placement["distributed_config"] = config_class(tp_size=tensor_parallel_size)
    try:
        with quiet():
            model, report = _untyped.AutoModelForCausalLM.from_pretrained(
                source.name,
                revision=source.revision,
                trust_remote_code=False,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=local,
                output_loading_info=True,
                **placement,
            )
    except _LOAD_ERRORS as error:
        if isinstance(error, KeyError) and error.args == (attention,):
            raise no_interface_error(name, config) from error
        raise _as_model_error(name, source, local, "its weights", error) from error
    missing = sorted(report.get("missing_keys") or ())
    if missing:  # transformers only warns and initialises them randomly
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} weights, for example {missing[0]}"
        )
    return model.eval().requires_grad_(False)


def no_interface_error(name: str, config: Any, why: Exception | None = None) -> ModelError:
    """Error for architectures that use their own attention classes."""
    told = f"{name}: {config.model_type} does not use transformers' attention interface"
    return ModelError(told if why is None else f"{told}: {why}")


def fingerprint(model: Any, frequencies: bytes = b"") -> str:
    """SHA-256 over the configuration, names, shapes and samples of the weights, and `frequencies`.

    `frequencies`: of rotary embeddings, where they depend on settings.

    Samples are rounded to bfloat16 and the dtype is left out, so a checkpoint has the same
    fingerprint on CPU in float32 as on CUDA in bfloat16. With tensor parallelism every rank must
    call it; the fingerprint is that of the whole model.
    """
    digest = hashlib.sha256()
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in _NOT_FINGERPRINTED
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(_stored_tensors(model)):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.device.type == "meta" or weight.numel() == 0:
            continue
        count = min(_FINGERPRINT_SAMPLES, weight.numel())
        index = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float64).long()
        sample = whole(weight.detach()).reshape(-1)[index.to(weight.device)]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    digest.update(frequencies)
    return digest.hexdigest()


def _stored_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name; of a quantised model its stored buffers too, and the parts of each weight.

    Not from `state_dict`, which in bitsandbytes converts weights in place.
    """
    if not getattr(model, "is_quantized", False):
        yield from model.named_parameters()
        return
    for prefix, module in model.named_modules():
        stored = {**module._parameters, **module._buffers}
        for name in sorted(stored.keys() - module._non_persistent_buffers_set):
            if stored[name] is not None:
                yield from _parts(f"{prefix}.{name}", stored[name])


def _parts(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a weight consists of."""
    if is_traceable_wrapper_subclass(weight):
        for part in weight.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(weight, part))
    else:
        yield name, weight.detach().as_subclass(torch.Tensor)


def _located(name: str) -> tuple[ModelSource, bool]:
    """The model's source, and whether to use local files only."""
    source = ModelSource.parse(name)
    path = source.directory
    if path is None:
        return source, bool(hub_constants.HF_HUB_OFFLINE)
    if not path.exists():
        raise ModelError(f"{name}: the directory does not exist")
    if not path.is_dir():
        raise ModelError(f"{name}: not a directory; a model is a directory with config.json")
    if not (path / "config.json").is_file():
        raise ModelError(f"{name}: the directory has no config.json")
    return replace(source, name=str(path)), True


def _check_code(name: str, source: ModelSource, local: bool) -> None:
    """Raises ModelError for a model that only code of its own repository can compute."""
    fields, _ = _untyped.PretrainedConfig.get_config_dict(
        source.name, revision=source.revision, local_files_only=local
    )
    code, model_type = fields.get("auto_map") or {}, fields.get("model_type")
    for entry, known in (("AutoConfig", _untyped.CONFIG_MAPPING), _CAUSAL):
        if entry in code and model_type not in known:
            raise ModelError(
                f"{name}: {model_type} is computed by code in the model's repository "
                f"({code[entry]}); trust_remote_code is off and cannot be switched on"
            )


def _as_model_error(
    name: str, source: ModelSource, local: bool, what: str, error: Exception
) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    where = ""
    if source.directory is None:
        where = " from the Hub's cache (offline)" if local else " from the Hugging Face Hub"
        where += "; no local directory has this name"
    return ModelError(f"{name}: cannot load {what}{where}: {lines[0][:300]}")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and training advice of transformers."""
    logs = _untyped.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
