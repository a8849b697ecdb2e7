"""Model engine: forward passes over packed sequences, the KV cache and sampling. The only package
that imports torch, when an engine is loaded; both model services use it.

    engine = load_engine(EngineOptions("path/to/model"))
    sequence = engine.store.open(max_len=100)
    logits = engine.forward([Append(sequence, prompt_ids, num_logits=1)])

Reading order: `options`, `interface`, `kv/` (pages, prefix_cache, sequence, tensors, placement,
store), `attention/` (interface, segments, shared_prefix, torch_backend), `engine`, `sampling/`,
then `loading/load` and what it imports. Sessions are in `outrider/model_server`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from outrider.engine.device_thread import DeviceThread
from outrider.engine.interface import (
    Append,
    SampledToken,
    Sampler,
    SampleRequest,
    ScoreRequest,
    ServedEngine,
)
from outrider.engine.kv.store import KVStore, Sequence
from outrider.engine.options import EngineInfo, EngineOptions
from outrider.errors import NO_ENGINE, ConfigError

if TYPE_CHECKING:
    from outrider.engine.engine import Engine


def __getattr__(name: str) -> Any:
    """`Engine` when it is first used: it imports torch, which simulated engines do not need."""
    if name != "Engine":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from outrider.engine.engine import Engine

    return Engine


def load_engine(options: EngineOptions) -> Engine:
    """Load a model and test it against plain attention; see `outrider.engine.loading.load`.

    The import is local: torch and transformers take three seconds to import, and simulated engines
    do not need them. Raises ConfigError also if torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:  # installed without the "model" extra
        raise ConfigError(NO_ENGINE)
    if options.tensor_parallel_size > 1:
        from outrider.engine.parallel.replica import load_engine as load_over_ranks

        return load_over_ranks(options)
    from outrider.engine.loading.load import load_engine as load

    return load(options)


__all__ = [
    "Append",
    "DeviceThread",
    "Engine",
    "EngineInfo",
    "EngineOptions",
    "KVStore",
    "SampleRequest",
    "SampledToken",
    "Sampler",
    "ScoreRequest",
    "Sequence",
    "ServedEngine",
    "load_engine",
]
