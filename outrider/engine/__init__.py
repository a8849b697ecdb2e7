"""Model engine: forward passes over packed sequences, the KV cache and sampling. The only package
that imports torch; both model services use it.

    engine = load_engine(EngineOptions("path/to/model"))
    sequence = engine.store.open(max_len=100)
    logits = engine.forward([Append(sequence, prompt_ids, num_logits=1)])

Reading order: `options`, `interface`, `kv/` (pages, prefix_cache, sequence, tensors, placement,
store), `attention/` (interface, segments, shared_prefix, torch_backend), `engine`, `sampling/`,
then `loading/load` and what it imports. Sessions are in `outrider/model_server`.
"""

import importlib.util

from outrider.errors import NO_ENGINE, ConfigError

if importlib.util.find_spec("torch") is None:  # installed without the "engine" extra
    raise ConfigError(NO_ENGINE)

from outrider.engine.device_thread import DeviceThread
from outrider.engine.engine import Append, Engine
from outrider.engine.interface import (
    SampledToken,
    Sampler,
    SampleRequest,
    ScoreRequest,
    ServedEngine,
)
from outrider.engine.kv.store import KVStore, Sequence
from outrider.engine.options import EngineInfo, EngineOptions


def load_engine(options: EngineOptions) -> Engine:
    """Load a model and test it against plain attention; see `outrider.engine.loading.load`.

    The import is local: transformers takes two seconds to import, and simulated engines do not need
    it.
    """
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
