"""Context length as in vLLM, and correct logits up to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.engine import Append, Engine, EngineOptions, load_engine
from outrider.errors import ConfigError
from outrider.settings.services import DraftConfig, TargetConfig
from tests.engine.reference import TOLERANCE, Reference
from tests.tiny_models import LOGIT_STD, make_tiny_model

TRAINED_LEN = 64
FACTOR = 4.0


def load(path: Path, **options: Any) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=512, **options))


def write_rope(directory: Path, name: str, rope: dict[str, Any]) -> Path:
    """Write config.json as published models have it: `name` is the only rope field."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    for former in ("rope_parameters", "rope_scaling"):
        fields.pop(former, None)
    if name == "rope_scaling":
        fields["rope_theta"] = 10_000.0
    else:
        rope = {"rope_theta": 10_000.0, **rope}
    path.write_text(json.dumps({**fields, name: rope}))
    return directory


YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED_LEN}
LINEAR = {"rope_type": "linear", "factor": FACTOR}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("rope_parameters", YARN),
    "yarn without the trained length": (
        "rope_parameters",
        {"rope_type": "yarn", "factor": FACTOR},
    ),
    "yarn, as Qwen's card": ("rope_scaling", YARN),
    "yarn, by its former key": (
        "rope_scaling",
        {
            "type": "yarn",
            "factor": FACTOR,
            "original_max_position_embeddings": TRAINED_LEN,
        },
    ),
    "linear": ("rope_parameters", LINEAR),
    "linear, by its former name": ("rope_scaling", LINEAR),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("how", ROPES)
def test_scaled_rope(how: str, family: str, tmp_path: Path) -> None:
    """The context is longer, and logits equal transformers' up to its last token."""
    path = make_tiny_model(family, tmp_path / "m", max_position_embeddings=TRAINED_LEN)
    engine = load(write_rope(path, *ROPES[how]))
    assert engine.info.max_context_len == TRAINED_LEN * FACTOR
    token_ids = np.random.default_rng(1).integers(256, size=256).tolist()
    expected = Reference(path).logits(token_ids)
    sequence = engine.store.open(256)
    for start in range(0, 256, 100):
        part = token_ids[start : start + 100]
        rows = engine.forward([Append(sequence, part, len(part))])
        difference = (rows - expected[start : start + 100]).abs().max()
        assert float(difference) <= TOLERANCE * LOGIT_STD
    with pytest.raises(ValueError, match="context"):
        engine.forward([Append(sequence, [1], 1)])
    engine.store.free(sequence)


def test_a_scaled_length_in_the_configuration_is_not_scaled_again(tmp_path: Path) -> None:
    """As in DeepSeek's and Llama 3's configurations."""
    path = make_tiny_model("llama", tmp_path / "m", max_position_embeddings=256)
    assert load(write_rope(path, "rope_parameters", YARN)).info.max_context_len == 256
    llama3 = {
        "rope_type": "llama3",
        "factor": FACTOR,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED_LEN,
    }
    assert load(write_rope(path, "rope_parameters", llama3)).info.max_context_len == 256


@pytest.mark.parametrize("max_model_len", [2, 100, 256])
def test_a_shorter_context_may_be_set(max_model_len: int, tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "m", max_position_embeddings=TRAINED_LEN)
    engine = load(write_rope(path, "rope_parameters", YARN), max_model_len=max_model_len)
    assert engine.info.max_context_len == max_model_len


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_longer_context_is_refused(family: str, tmp_path: Path) -> None:
    path = make_tiny_model(family, tmp_path / "m", max_position_embeddings=256)
    with pytest.raises(ConfigError) as refused:
        load(path, max_model_len=257)
    assert str(refused.value) == f"max_model_len: 257 exceeds the context of {path}, 256"


@pytest.mark.parametrize("config", [TargetConfig, DraftConfig])
def test_a_context_below_two_tokens_is_refused(config: type[TargetConfig | DraftConfig]) -> None:
    for wrong in (1, 0, -1):
        with pytest.raises(ConfigError, match="max_model_len: must be 2 or more"):
            config(model="m", max_model_len=wrong)
