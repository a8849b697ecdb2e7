"""Loads an engine: checkpoint → guards → prepacked weights → back end and probe → KV memory.

The order matters: the fingerprint and the eager reference need the weights as they were stored,
the probe tests the engine as it will serve, and the KV memory takes what is left.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface

from outrider.engine.attention import select as backends
from outrider.engine.attention.interface import ATTENTION_NAME, registered_attention
from outrider.engine.engine import Engine
from outrider.engine.kv import budget as memory
from outrider.engine.kv.store import PAGE_SIZE, KVStore, LayerLayout
from outrider.engine.loading import checkpoint, prepack
from outrider.engine.loading import self_test as probe
from outrider.engine.loading import supported as guards
from outrider.engine.loading.loaded_model import BoundModel
from outrider.engine.loading.long_self_test import LongSelfTest, long_probe
from outrider.engine.options import EngineInfo, EngineOptions
from outrider.errors import ConfigError, ModelError

_log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# No mask function is registered under this name: transformers then makes no mask at all.
AttentionInterface.register(ATTENTION_NAME, registered_attention)

# Pages of the small store that the probe uses before the real one is allocated.
_PROBE_PAGES = 8


def load_engine(options: EngineOptions) -> Engine:
    """Loads and checks a model. Call it on the device thread; it takes seconds to minutes.

    Raises ModelError, naming the model, if it cannot be loaded or would not be served
    correctly, and ConfigError for options that make no sense.
    """
    device = _device(options)
    _set_threads(options)
    config = checkpoint.load_config(options.model)
    guards.check_config(options.model, config)
    module = _load_module(options, config, device)
    guards.check_interface(options.model, module)
    layers = guards.discover_layers(options.model, module)
    model = _bind(options, module)
    tokens = probe.probe_tokens(module, model.max_context_len)
    expected = probe.eager_logits(module, tokens)
    long = long_probe(options.model, model)
    model = replace(model, vocab_size=expected[0].shape[-1])
    info = _describe(options, model, layers)
    linear_kernels = _choose_kernels(options, module)
    backend_name, difference = _prove(options, _Trial(model, layers, info, tokens, expected, long))
    store = KVStore(layers, _num_pages(options, layers))
    info = replace(
        info,
        kv_capacity_tokens=store.capacity_tokens,
        attention_backend="sdpa" if backend_name == backends.TORCH else backend_name,
        linear_kernels=linear_kernels,
        probe_max_difference=difference,
    )
    backend = backends.make(backend_name, model, store)
    engine = Engine(model, store, info, backend)
    if options.cuda_graphs and options.device_map is None:
        graphs = backends.choose_graphs(engine, model, backend)
        info = replace(info, cuda_graphs=graphs is not None)
        engine = Engine(model, store, info, backend, graphs)
    _log.info("loaded %s", info)
    return engine


class _Trial(NamedTuple):
    """A model that is loaded but not yet served, and what eager attention says to `tokens`."""

    model: BoundModel
    layers: list[LayerLayout]
    info: EngineInfo
    tokens: tuple[probe.Tokens, probe.Tokens]
    expected: list[torch.Tensor]
    long: LongSelfTest | None

    def difference(self, backend_name: str) -> float:
        """From eager attention, largest; with small stores of their own. Raises ModelError."""
        name = self.info.name
        engine = self._engine(backend_name, _PROBE_PAGES)
        largest = probe.compare(name, engine, self.tokens, self.expected)
        if self.long is None:
            return largest
        engine = self._engine(backend_name, self.long.num_pages)
        return max(largest, self.long.difference(name, engine))

    def _engine(self, backend_name: str, num_pages: int) -> Engine:
        store = KVStore(self.layers, num_pages)
        return Engine(self.model, store, self.info, backends.make(backend_name, self.model, store))


def _prove(options: EngineOptions, trial: _Trial) -> tuple[str, float]:
    """The back end that serves this model, and its largest difference from eager attention.

    FlashInfer compiles its kernels here, which may fail: then it is torch, unless it was asked for.
    """
    name = backends.choose(options.attention_backend, trial.model, trial.layers)
    if name == backends.TORCH:
        return name, trial.difference(name)
    try:
        return name, trial.difference(name)
    except ModelError:
        raise
    except Exception as error:  # a compiler run by someone else's code may fail in any way
        if options.attention_backend == name:
            raise ConfigError(f"attention_backend {name!r} fails here: {error}") from error
        _log.warning("attention is torch's, FlashInfer fails here: %s", error)
    return backends.TORCH, trial.difference(backends.TORCH)


def _describe(options: EngineOptions, model: BoundModel, layers: list[LayerLayout]) -> EngineInfo:
    """What can be said before the weights are prepacked and the memory is there."""
    module = model.module
    return EngineInfo(
        name=options.model,
        architecture=module.config.model_type,
        vocab_size=model.vocab_size,
        max_context_len=model.max_context_len,
        eos_token_ids=_eos_token_ids(module, options.tokenizer_eos_ids),
        dtype=_dtype_name(module),
        device=_device_names(layers),
        num_parameters=module.num_parameters(),
        kv_capacity_tokens=0,
        model_fingerprint=checkpoint.fingerprint(module),
        attention_backend="sdpa",
        probe_max_difference=0.0,
    )


def _dtype_name(module: Any) -> str:
    return str(module.dtype).removeprefix("torch.")


def _set_threads(options: EngineOptions) -> None:
    if options.num_threads is not None:
        if options.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, not {options.num_threads}")
        torch.set_num_threads(options.num_threads)


def _device(options: EngineOptions) -> torch.device:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _load_module(options: EngineOptions, config: Any, device: torch.device) -> Any:
    if options.dtype != "auto" and options.dtype not in _DTYPES:
        raise ConfigError(f"dtype {options.dtype!r}: expected auto, {', '.join(_DTYPES)}")
    auto: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    module = checkpoint.load_weights(
        options.model,
        config,
        dtype=_DTYPES.get(options.dtype, auto),
        attention=ATTENTION_NAME,
        device_map=options.device_map,
    )
    if options.inflate_parameters is not None:
        module = _inflated(options.model, module, options.inflate_parameters)
    if options.device_map is None:
        return module.to(device)
    _leave_row_index_alone(module)
    return module


def _leave_row_index_alone(module: Any) -> None:
    """Keeps accelerate from moving `logits_to_keep` to the first device.

    The hidden states it selects from are on the last one; an index on the CPU selects from any.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        skipped = getattr(hook, "skip_keys", None) or []
        hook.skip_keys = [*([skipped] if isinstance(skipped, str) else skipped), "logits_to_keep"]


def _inflated(name: str, module: Any, num_parameters: int) -> Any:
    from outrider.engine.loading.inflate import inflate  # only the quickstart needs it

    try:
        large: Any = inflate(module, num_parameters)
    except ValueError as error:
        raise ModelError(f"{name}: cannot be inflated to {num_parameters}: {error}") from error
    large.set_attn_implementation(ATTENTION_NAME)
    return large.eval().requires_grad_(False)


def _bind(options: EngineOptions, module: Any) -> BoundModel:
    embedding = module.get_input_embeddings().weight
    return BoundModel(
        module=module,
        windows=guards.sliding_windows(module.config),
        num_embeddings=embedding.shape[0],
        vocab_size=0,
        max_context_len=guards.context_len(options.model, module.config, options.max_model_len),
        device=embedding.device,
    )


def _choose_kernels(options: EngineOptions, module: Any) -> dict[str, int]:
    """Prepack the linear layers where possible; the number of layers by kernel."""
    forbidden = options.forbid_kernels
    unknown = forbidden.difference(prepack.PREPACKED_KERNELS)
    if unknown:
        names = ", ".join(prepack.PREPACKED_KERNELS)
        raise ConfigError(f"forbid_kernels: {', '.join(sorted(unknown))!r}: expected {names}")
    if not options.prepack or options.device_map is not None:
        forbidden = frozenset(prepack.PREPACKED_KERNELS)
    num_layers = prepack.choose_kernels(module, forbidden)
    if module.device.type == "cpu":
        _log.info("linear layers by kernel: %s", num_layers)
        if num_layers.get(prepack.TORCH_KERNEL) and module.dtype.itemsize < 4:
            _log.warning(
                "%s: %s runs without a prepacked kernel on this CPU (%s), which can be many times "
                "slower than float32; consider --dtype float32",
                options.model, _dtype_name(module), torch.backends.cpu.get_cpu_capability(),
            )  # fmt: skip
    return num_layers


def _eos_token_ids(module: Any, tokenizer_ids: Sequence[int]) -> tuple[int, ...]:
    """Of the model's configuration, and the tokenizer's, as in vLLM."""
    for source in (module.generation_config, module.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            configured = ids if isinstance(ids, list | tuple) else (ids,)
            return tuple(dict.fromkeys(int(i) for i in (*configured, *tokenizer_ids)))
    return tuple(tokenizer_ids)


def _device_names(layers: list[LayerLayout]) -> str:
    return ",".join(dict.fromkeys(str(layer.device) for layer in layers))


def _num_pages(options: EngineOptions, layers: list[LayerLayout]) -> int:
    if options.kv_cache_tokens is not None:
        if options.kv_cache_tokens < PAGE_SIZE:
            raise ConfigError(f"kv_cache_tokens must be at least {PAGE_SIZE}")
        return options.kv_cache_tokens // PAGE_SIZE
    num_pages = memory.affordable_tokens(layers) // PAGE_SIZE
    if num_pages == 0:
        raise ModelError(f"{options.model}: no memory is left for keys and values")
    return num_pages
