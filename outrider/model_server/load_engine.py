"""Builds the engine and its ModelInfo from a model service's settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import NamedTuple

from outrider.engine import EngineInfo, EngineOptions, ServedEngine, load_engine
from outrider.engine.simulated import SimulatedEngine
from outrider.errors import ConfigError, InvalidRequest
from outrider.grammar import GrammarCompiler, grammar_compiler
from outrider.runtime.protobuf import sampling_from_proto
from outrider.settings.services import DraftConfig, ModelServiceConfig
from outrider.settings.simulation import Simulation
from outrider.tokenizer import Tokenizer
from outrider.tokenizer_files import TokenizerFiles
from outrider.v1 import model_pb2, sampling_pb2


class LoadedModel(NamedTuple):
    """A loaded model. `grammars`: None without a tokenizer of which grammars can be made."""

    engine: ServedEngine
    model: model_pb2.ModelInfo
    grammars: GrammarCompiler | None = None


def load_served_engine(config: ModelServiceConfig) -> LoadedModel:
    """Loads the model and its tokenizer. Called on the device thread. Raises ConfigError."""
    if config.simulate is not None:
        simulation = Simulation.parse(config.simulate, is_draft=isinstance(config, DraftConfig))
        simulated = SimulatedEngine(simulation, config.kv_cache_tokens)
        model = _model_info(simulated.info, None, config.max_gamma)
        # Equal simulations have the same vocabulary by construction. Another name, another model.
        model.tokenizer_fingerprint = model.model_fingerprint
        if simulation.name != Simulation.name:
            model.model_fingerprint += f"-{simulation.name}"
        return LoadedModel(simulated, model)
    tokenizer = Tokenizer.load(config.model_at_revision)
    eos_id = tokenizer.eos_token_id if tokenizer is not None and config.tokenizer_eos else None
    engine = load_engine(
        EngineOptions(
            model=config.model_at_revision,
            dtype=config.dtype,
            device=config.device,
            device_map=config.device_map,
            kv_cache_tokens=config.kv_cache_tokens,
            max_model_len=config.max_model_len,
            max_step_tokens=config.max_step_tokens,
            num_threads=config.num_threads,
            prepack=config.prepack,
            forbid_kernels=_names(config.forbid_kernels),
            attention_backend=config.attention_backend,
            cuda_graphs=config.cuda_graphs,
            tokenizer_eos_ids=() if eos_id is None else (eos_id,),
            tensor_parallel_size=config.tensor_parallel_size,
            tensor_parallel_address=config.tensor_parallel_address,
            tensor_parallel_timeout_s=config.tensor_parallel_timeout_s,
            inflate_parameters=config.inflate_parameters,
        )
    )
    model = _model_info(engine.info, tokenizer, config.max_gamma)
    if config.generation_config == "auto":
        model.sampling_defaults.CopyFrom(
            sampling_defaults(config.model_at_revision, engine.info.vocab_size)
        )
    info = engine.info
    if not info.eos_token_ids:  # an output in a format ends with EOS
        return LoadedModel(engine, model)
    grammars = grammar_compiler(tokenizer, info.vocab_size, info.eos_token_ids)
    return LoadedModel(engine, model, grammars)


def sampling_defaults(model: str, vocab_size: int) -> sampling_pb2.SamplingParams:
    """Sampling defaults from generation_config.json, for the same fields as vLLM's.

    Raises ConfigError if the file cannot be read or a value is not allowed.
    """
    path = TokenizerFiles(model).find("generation_config.json")
    if path is None:
        return sampling_pb2.SamplingParams()
    try:
        settings = json.loads(path.read_text("utf-8"))
        given = {name: settings.get(key) for key, name in _DEFAULTS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        defaults = sampling_pb2.SamplingParams(**given)
        params = sampling_from_proto(defaults, default_max_tokens=1, default_seed=0)
        params.validate(vocab_size)
    except (ValueError, TypeError, AttributeError, InvalidRequest) as error:
        raise ConfigError(
            f"{path}: {error}; use --generation-config none to ignore this file"
        ) from error
    return defaults


# Field names in generation_config.json and in SamplingParams.
_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def _names(listed: str) -> frozenset[str]:
    """The names in a comma-separated list."""
    return frozenset(name.strip() for name in listed.split(",") if name.strip())


def _model_info(
    info: EngineInfo, tokenizer: Tokenizer | None, max_gamma: int
) -> model_pb2.ModelInfo:
    fields = asdict(info)
    names = model_pb2.ModelInfo.DESCRIPTOR.fields_by_name
    return model_pb2.ModelInfo(
        **{name: value for name, value in fields.items() if name in names},
        tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else "",
        token_hashes=tokenizer.vocabulary.to_bytes() if tokenizer else b"",
        max_gamma=max_gamma,
    )
