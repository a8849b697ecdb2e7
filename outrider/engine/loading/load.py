"""Engine loading: checkpoint, checks, prepacked weights, backend, self-test, KV memory.

The order matters: the fingerprint and the eager reference need the weights as stored; the self-test
runs the engine as it will serve; the KV memory takes what is left.

With tensor parallelism (`parallel/`) every rank loads its part by the same calls in the same order,
because each pass is a pass of all ranks. What depends on a rank's time or memory is agreed upon:
the lowest value counts. `device_map` differs: it places whole layers on several devices
(accelerate), which run one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from outrider.engine import step_memory
from outrider.engine.attention import select
from outrider.engine.attention.interface import ATTENTION_NAME
from outrider.engine.engine import Engine
from outrider.engine.kv.budget import affordable_tokens
from outrider.engine.kv.store import PAGE_SIZE, KVStore, LayerLayout
from outrider.engine.loading import (
    checkpoint,
    families,
    placement,
    prepack,
    quantized,
    rope,
    self_test,
    supported,
)
from outrider.engine.loading.linear_kernels import FORBIDDABLE, TorchLinear
from outrider.engine.loading.loaded_model import BoundModel
from outrider.engine.loading.long_self_test import LongSelfTest, prepare_long_self_test
from outrider.engine.options import EngineInfo, EngineOptions
from outrider.engine.parallel.group import RankGroup
from outrider.engine.parallel.operations import OperationLog, make_store
from outrider.errors import ConfigError, ModelError, StepOutOfMemory

_log = logging.getLogger(__name__)

# Pages of the small KV store for the self-test, before the real one is allocated.
_SELF_TEST_PAGES = 8
_ALONE = RankGroup()


def load_engine(
    options: EngineOptions, group: RankGroup = _ALONE, log: OperationLog | None = None
) -> Engine:
    """Load a model and test it. Call it on the device thread; it takes seconds to minutes.

    Raises ModelError, naming the model, if it cannot be loaded or would be served incorrectly, and
    ConfigError for invalid options. `group`: the ranks that load the model together. `log`: on rank
    0 of several, where the others read what to do.
    """
    device = placement.served_device(options.device)
    _set_threads(options)
    config = checkpoint.load_config(options.model)
    supported.check_config(options.model, config)
    module = _load_module(options, config, device)
    supported.check_interface(options.model, module)
    with quantized.naming_failures(options.model, config):
        layers = supported.discover_layers(options.model, module)
        model = _bind(options, module)
        tokens = self_test.short_sequences(module, model.max_context_len)
        expected = self_test.eager_logits(module, tokens)
    long = prepare_long_self_test(options.model, model, group)
    model = replace(model, vocab_size=expected[0].shape[-1])
    info = _describe(options, model, layers, group)
    linear_kernels = _choose_kernels(options, module)
    untested = _UntestedModel(model, layers, info, tokens, expected, long)
    backend_name, difference = _tested_backend(options, untested, group)
    num_pages = _num_pages(options, untested, backend_name, group)
    store = make_store(layers, group.lowest(num_pages), group, log)
    info = replace(
        info,
        kv_capacity_tokens=store.capacity_tokens,
        attention_backend="sdpa" if backend_name == select.TORCH else backend_name,
        linear_kernels=linear_kernels,
        self_test_max_difference=difference,
    )
    backend = select.make(backend_name, model, store)
    engine = Engine(model, store, info, backend, log=log)
    if options.cuda_graphs and options.device_map is None and group.size == 1:
        graphs = select.choose_graphs(engine, model, backend)
        info = replace(info, cuda_graphs=graphs is not None)
        engine = Engine(model, store, info, backend, graphs)
    if options.cuda_graphs and device.type == "cuda" and group.size > 1:
        _log.info("CUDA graphs are off with several ranks")
    group.limit_waits(module, options.tensor_parallel_timeout_s)
    _log.info("loaded %s", info)
    if group.rank == 0:
        families.log_untested(options.model, module.config.get_text_config().model_type)
    return engine


class _UntestedModel(NamedTuple):
    """A loaded model before its self-test, with the eager logits `expected` for `tokens`."""

    model: BoundModel
    layers: list[LayerLayout]
    info: EngineInfo
    tokens: tuple[self_test.Tokens, self_test.Tokens]
    expected: list[torch.Tensor]
    long: LongSelfTest | None

    def difference(self, backend_name: str) -> float:
        """Largest difference from eager attention, on small KV stores; ModelError if too large."""
        name = self.info.name
        engine = self.engine(backend_name, _SELF_TEST_PAGES)
        largest = self_test.compare(name, engine, self.tokens, self.expected)
        if self.long is None:
            return largest
        engine = self.engine(backend_name, self.long.num_pages)
        return max(largest, self.long.difference(name, engine))

    def engine(self, backend_name: str, num_pages: int) -> Engine:
        """The engine with a small KV store."""
        store = KVStore(self.layers, num_pages)
        return Engine(self.model, store, self.info, select.make(backend_name, self.model, store))


def _tested_backend(
    options: EngineOptions, untested: _UntestedModel, group: RankGroup
) -> tuple[str, float]:
    """Backend that serves this model, and its largest difference from eager attention.

    FlashInfer compiles its kernels here, which may fail. Torch is used then, unless FlashInfer was
    requested explicitly or another rank may not fail.
    """
    name = select.choose(options.attention_backend, untested.model, untested.layers)
    if name == select.TORCH:
        return name, untested.difference(name)
    try:
        return name, untested.difference(name)
    except ModelError:
        raise
    except Exception as error:  # FlashInfer runs a compiler, which may fail in any way
        if options.attention_backend == name or group.size > 1:
            raise ConfigError(
                f"attention_backend: {name!r} fails here, use torch: {error}"
            ) from error
        _log.warning("attention by torch: FlashInfer fails here: %s", error)
    return select.TORCH, untested.difference(select.TORCH)


def _describe(
    options: EngineOptions, model: BoundModel, layers: list[LayerLayout], group: RankGroup
) -> EngineInfo:
    """EngineInfo with what is known before prepacking and KV allocation."""
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
        model_fingerprint=checkpoint.fingerprint(module, rope.fixed_frequencies(module)),
        attention_backend="sdpa",
        self_test_max_difference=0.0,
        max_step_rows=group.lowest(step_memory.max_step_rows(model.vocab_size, model.device)),
        quantization=quantized.method(module.config) or "",
        tensor_parallel_size=options.tensor_parallel_size,
    )


def _dtype_name(module: Any) -> str:
    return str(module.dtype).removeprefix("torch.")


def _set_threads(options: EngineOptions) -> None:
    if options.num_threads is not None:
        if options.num_threads < 1:
            raise ConfigError(f"num_threads: {options.num_threads} is too small; at least 1")
        torch.set_num_threads(options.num_threads)


def _load_module(options: EngineOptions, config: Any, device: torch.device) -> Any:
    """Load the weights, inflate them if asked, and place them on the device or by `device_map`."""
    stored = quantized.method(config)
    module = checkpoint.load_weights(
        options.model,
        config,
        dtype=placement.served_dtype(options.dtype, device.type),
        attention=ATTENTION_NAME,
        device_map=options.device_map,
        tensor_parallel_size=options.tensor_parallel_size,
    )
    quantized.log_loaded(options.model, stored, module)
    if options.inflate_parameters is not None:
        module = _inflated(options.model, module, options.inflate_parameters)
    rope.fix_frequencies(options.model, module, options.max_model_len)
    if options.tensor_parallel_size > 1:  # placed already
        return module
    if options.device_map is None:
        return module.to(device)
    placement.keep_row_index_on_cpu(module)
    return module


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
        windows=supported.sliding_windows(module.config),
        num_embeddings=embedding.shape[0],
        vocab_size=0,
        max_context_len=supported.context_len(options.model, module.config, options.max_model_len),
        device=embedding.device,
    )


def _choose_kernels(options: EngineOptions, module: Any) -> dict[str, int]:
    """Choose the kernels of linear layers; return the number of layers by kernel."""
    forbidden = options.forbid_kernels
    unknown = forbidden.difference(FORBIDDABLE)
    if unknown:
        names = ", ".join(FORBIDDABLE)
        raise ConfigError(
            f"forbid_kernels: {', '.join(sorted(unknown))!r} is unknown; expected {names}"
        )
    if not options.prepack or options.device_map is not None:
        forbidden = frozenset(FORBIDDABLE)
    num_layers = prepack.choose_kernels(module, forbidden)
    if module.device.type == "cpu":
        _log.info("linear layers by kernel: %s", num_layers)
        if num_layers.get(TorchLinear.name) and module.dtype.itemsize < 4:
            _log.warning(
                "%s: %s runs without a prepacked kernel on this CPU (%s), which can be many times "
                "slower than float32; consider --dtype float32",
                options.model, _dtype_name(module), torch.backends.cpu.get_cpu_capability(),
            )  # fmt: skip
    return num_layers


def _eos_token_ids(module: Any, tokenizer_ids: Sequence[int]) -> tuple[int, ...]:
    """EOS ids of the model's configuration and of the tokenizer, as in vLLM."""
    for source in (module.generation_config, module.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            configured = ids if isinstance(ids, list | tuple) else (ids,)
            return tuple(dict.fromkeys(int(i) for i in (*configured, *tokenizer_ids)))
    return tuple(tokenizer_ids)


def _device_names(layers: list[LayerLayout]) -> str:
    return ",".join(dict.fromkeys(str(layer.device) for layer in layers))


def _num_pages(
    options: EngineOptions, untested: _UntestedModel, backend_name: str, group: RankGroup
) -> int:
    """KV pages to allocate. Raises ConfigError or ModelError if there would be none.

    Unless their number is given, what is left beside the largest pass, which is run here.
    """
    if options.kv_cache_tokens is not None:
        if options.kv_cache_tokens < PAGE_SIZE:
            raise ConfigError(
                f"kv_cache_tokens: {options.kv_cache_tokens} is too small; at least {PAGE_SIZE}"
            )
        return options.kv_cache_tokens // PAGE_SIZE
    info, num_rows = untested.info, untested.info.max_step_rows
    num_tokens = max(options.max_step_tokens, num_rows + options.max_step_tokens // 4)
    measured_pages = step_memory.num_pages(num_tokens, info.max_context_len)
    try:
        num_bytes = step_memory.step_bytes(
            untested.engine(backend_name, measured_pages), num_tokens, num_rows, group
        )
    except StepOutOfMemory as error:
        raise ModelError(
            f"{options.model}: no memory for the largest pass; lower --max-step-tokens "
            f"({options.max_step_tokens}): {error}"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the measured engine's KV
    _log.info("a pass over %d tokens with %d rows of logits needs %.0f MiB",
              num_tokens, num_rows, num_bytes / 2**20)  # fmt: skip
    num_pages = affordable_tokens(untested.layers, num_bytes, group.place.num_local) // PAGE_SIZE
    if num_pages == 0:
        raise ModelError(f"{options.model}: no memory left for keys and values")
    return num_pages
