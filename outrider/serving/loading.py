"""From a service's settings to a loaded engine and what the wire says about it."""

from __future__ import annotations

from dataclasses import asdict

from outrider.config import DraftConfig, ModelServiceConfig
from outrider.engine import EngineInfo, EngineOptions, ServedEngine, load_engine
from outrider.engine.simulated import SimulatedEngine
from outrider.simulation import Simulation
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2


def load_served_engine(
    config: ModelServiceConfig,
) -> tuple[ServedEngine, model_pb2.ModelInfo]:
    """Loads the model and its tokenizer's fingerprint; on the device thread. Raises ConfigError."""
    if config.simulate is not None:
        simulation = Simulation.parse(config.simulate, is_draft=isinstance(config, DraftConfig))
        simulated = SimulatedEngine(simulation, config.kv_cache_tokens)
        return simulated, _model_info(simulated.info, None, config.max_gamma)
    engine = load_engine(
        EngineOptions(
            model=config.model,
            dtype=config.dtype,
            device=config.device,
            device_map=config.device_map,
            kv_cache_tokens=config.kv_cache_tokens,
            num_threads=config.num_threads,
            prepack=config.prepack,
            forbid_kernels=_names(config.forbid_kernels),
            attention_backend=config.attention_backend,
            cuda_graphs=config.cuda_graphs,
            inflate_parameters=config.inflate_parameters,
        )
    )
    tokenizer = Tokenizer.load(config.model)
    return engine, _model_info(engine.info, tokenizer, config.max_gamma)


def _names(listed: str) -> frozenset[str]:
    """Names in a list separated by commas."""
    return frozenset(name.strip() for name in listed.split(",") if name.strip())


def _model_info(
    info: EngineInfo, tokenizer: Tokenizer | None, max_gamma: int
) -> model_pb2.ModelInfo:
    said = asdict(info)
    names = model_pb2.ModelInfo.DESCRIPTOR.fields_by_name
    return model_pb2.ModelInfo(
        **{name: value for name, value in said.items() if name in names},
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else "",
        max_gamma=max_gamma,
    )
