"""The model engine: the only place with torch. Both tiers use it.

    engine = load_engine(EngineOptions("path/to/model"))
    sequence = engine.store.open(max_len=100)
    logits = engine.forward([Append(sequence, prompt_ids, num_logits=1)])

Reading order: options, pages, prefix_cache, sequence, kv_rows, kv_store, attention, segments,
branches, packed, bound, flashinfer_backend, graphs, engine, then what loading needs: checkpoint,
guards, prepack, probe, memory, backends, model. It knows nothing of sampling or sessions.
"""

import importlib.util

from outrider.errors import NO_ENGINE, ConfigError

if importlib.util.find_spec("torch") is None:  # an installation for callers and orchestrators
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
    """Load and check a model; see `outrider.engine.loading.load`.

    Imported here: transformers takes two seconds, which simulated engines do without.
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
