"""Families of the table of supported models: as transformers computes them, or refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from outrider.engine import Append, Engine, EngineOptions, load_engine
from outrider.engine.loading.families import FAMILIES, REFUSALS, Refusal
from outrider.errors import ModelError
from tests.engine.reference import Reference, Shadow
from tests.families import MODELS, save_family
from tests.tiny_models import FAMILIES as TINY_FAMILIES
from tests.tiny_models import tiny_model_type

# These two got transformers' attention interface after 5.17: refused by name before.
_LATE_FAMILIES = ("codegen", "gptj")


def test_every_family_of_the_table_is_run() -> None:
    """Here, or among the models of test_equivalence.py."""
    listed = [family.model_type for family in FAMILIES]
    run = {*MODELS, *map(tiny_model_type, TINY_FAMILIES)}
    assert set(listed) == run
    assert listed == sorted(set(listed))


def _uses_attention_interface(model: torch.nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__])


@pytest.mark.parametrize("model_type", MODELS)
def test_equals_eager(model_type: str, tmp_path: Path) -> None:
    """Two ragged sequences in the same passes, with roll-back and chunked prefill."""
    model = save_family(model_type, tmp_path)
    assert model.config.model_type == model_type
    if model_type in _LATE_FAMILIES and not _uses_attention_interface(model):
        with pytest.raises(ModelError, match="does not use transformers' attention interface"):
            load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
        return

    engine = load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
    check_ragged_steps(engine, tmp_path, model_type)


def check_ragged_steps(engine: Engine, path: Path, model_type: str) -> None:
    """Logits of every step are those of the model in `path`, computed by transformers."""
    shadow = Shadow(Reference(path), seed=0)
    first, second = engine.store.open(60), engine.store.open(60)
    tokens: list[list[int]] = [[], []]
    for counts, cut in [((21, 40), 0), ((5, 1), 3), ((1, 5), 1), ((7, 6), 0)]:
        new = [shadow.random_tokens(count) for count in counts]
        logits = engine.forward([Append(first, new[0], counts[0]), Append(second, new[1], 1)])
        for appended, ids in zip(tokens, new, strict=True):
            appended += ids
        shadow.assert_rows(logits[: counts[0]], tokens[0], f"{model_type}, first")
        shadow.assert_rows(logits[counts[0] :], tokens[1], f"{model_type}, second")
        engine.store.truncate(first, first.length - cut)
        del tokens[0][first.length :]
    engine.store.check_integrity()


_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_DEEP = {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 32}
# Refused for their attention classes: the weights are loaded first. The others by config.json.
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "bert": {**_SMALL, "intermediate_size": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2},
    "falcon": _SMALL,
    "gpt_neo": {
        "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 2, "n_layers": 2},
}  # fmt: skip
_BY_CONFIG: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_n_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"num_hidden_layers": 2},
    "minimax": {"num_local_experts": 4},
}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.model_type)
def test_a_family_of_the_table_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    kind = transformers.CONFIG_MAPPING[refusal.model_type]
    fields = _WITH_WEIGHTS.get(refusal.model_type)
    if fields is None:
        fields = {**_DEEP, **_BY_CONFIG.get(refusal.model_type, {})}
        kind(**fields).save_pretrained(tmp_path)
    else:
        auto: Any = transformers.AutoModelForCausalLM
        auto.from_config(kind(**fields)).save_pretrained(tmp_path)
    why = f"{tmp_path}: .*{refusal.reason}"
    with pytest.raises(ModelError, match=why):
        load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))


def test_an_encoder_is_refused_by_its_architecture(tmp_path: Path) -> None:
    transformers.BertConfig(**_SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="BertForMaskedLM is not a causal language model"):
        load_engine(EngineOptions(str(tmp_path)))


def test_a_family_without_tests_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.CONFIG_MAPPING["bitnet"](**{**_DEEP, "max_position_embeddings": 64})
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "outrider"):
        load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
    assert "bitnet is not among the families that are tested" in caplog.text
