"""Rope types that depend on length: every sequence has the frequencies of the longest served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from outrider.engine import Append, Engine, EngineOptions, load_engine
from outrider.engine.loading.rope import fix_frequencies
from outrider.errors import ModelError
from tests.engine.reference import Reference, Shadow
from tests.families import save_family
from tests.tiny_models import make_tiny_model

TRAINED_LEN, CONTEXT_LEN, HEAD_DIM = 64, 256, 16
FACTOR = CONTEXT_LEN / TRAINED_LEN
SHORT = [1.0 + 0.05 * i for i in range(HEAD_DIM // 2)]
LONG = [2.0 + 0.5 * i for i in range(HEAD_DIM // 2)]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": FACTOR}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": TRAINED_LEN,
    "short_factor": SHORT,
    "long_factor": LONG,
}
MODELS = {
    "dynamic": ("llama", DYNAMIC, TRAINED_LEN),
    "longrope": ("llama", LONGROPE, CONTEXT_LEN),
    "longrope of Phi-3": ("phi3", LONGROPE, CONTEXT_LEN),
}


def make(kind: str, directory: Path) -> Path:
    family, rope, trained_len = MODELS[kind]
    path = make_tiny_model(family, directory / "m", max_position_embeddings=trained_len)
    return with_rope(path, path, rope, original_max_position_embeddings=TRAINED_LEN)


def with_rope(source: Path, directory: Path, rope: dict[str, Any], **fields: Any) -> Path:
    """The same weights with another rope."""
    if source != directory:
        shutil.copytree(source, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"rope_parameters": rope} | fields
    path.write_text(json.dumps(config))
    return directory


def of_longest(kind: str, path: Path) -> Path:
    """The same model with frequencies that do not depend on length: those of CONTEXT_LEN."""
    rope: dict[str, Any] = LONGROPE | {"short_factor": LONG}
    fields: dict[str, Any] = {}
    if kind == "dynamic":
        scale = FACTOR * CONTEXT_LEN / TRAINED_LEN - (FACTOR - 1)
        theta = 1e4 * scale ** (HEAD_DIM / (HEAD_DIM - 2))
        rope = {"rope_type": "default", "rope_theta": theta}
        fields = {"max_position_embeddings": CONTEXT_LEN}
    return with_rope(path, path.parent / "longest", rope, **fields)


def load(path: Path, **options: Any) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=1024, **options))


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_lengths_in_one_batch(kind: str, tmp_path: Path) -> None:
    """A long and a short sequence in the same passes, prefilled in parts, across TRAINED_LEN."""
    path = make(kind, tmp_path)
    engine = load(path)
    assert engine.info.max_context_len == CONTEXT_LEN
    shadow = Shadow(Reference(of_longest(kind, path)), seed=0)
    sequences = [engine.store.open(CONTEXT_LEN), engine.store.open(100)]
    tokens: list[list[int]] = [[], []]
    for counts in ((40, 3), (30, 1), (1, 60), (CONTEXT_LEN - 71, 5)):
        new = [shadow.random_tokens(count) for count in counts]
        logits = engine.forward(
            [Append(s, ids, len(ids)) for s, ids in zip(sequences, new, strict=True)]
        )
        for ids, more in zip(tokens, new, strict=True):
            ids += more
        shadow.assert_rows(logits[: counts[0]], tokens[0], f"{kind}, long")
        shadow.assert_rows(logits[counts[0] :], tokens[1], f"{kind}, short")
    # transformers computes the same for the longest; its powers are rounded elsewhere.
    published = Reference(path).logits(tokens[0])[-counts[0] :]
    assert float((logits[: counts[0]] - published).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_a_short_context_has_the_trained_frequencies(kind: str, tmp_path: Path) -> None:
    """With --max-model-len up to the trained length, as transformers at every length."""
    path = make(kind, tmp_path)
    engine = load(path, max_model_len=TRAINED_LEN)
    shadow = Shadow(Reference(path), seed=0)
    for length in (5, TRAINED_LEN):
        sequence, ids = engine.store.open(length), shadow.random_tokens(length)
        shadow.assert_rows(engine.forward([Append(sequence, ids, length)]), ids, kind)


class _Recomputed(LlamaRotaryEmbedding):
    """As PhiMoE's: looks at the positions of the batch whatever its rope type is."""

    def forward(self, x: Any, position_ids: Any) -> Any:
        longest = float(position_ids.max())
        angles = position_ids[..., None].float() * self.inv_freq / longest
        return angles.cos(), angles.sin()


def test_frequencies_that_cannot_be_fixed_are_refused(tmp_path: Path) -> None:
    model: Any = Reference(make("dynamic", tmp_path))._model
    model.model.rotary_emb = _Recomputed(model.config)
    with pytest.raises(ModelError, match="m: rope type 'dynamic' of llama depends on the longest"):
        fix_frequencies("m", model)
    del model.model.rotary_emb
    with pytest.raises(ModelError, match="sequences would affect each other"):
        fix_frequencies("m", model)


def test_longrope_of_phimoe_is_refused(tmp_path: Path) -> None:
    save_family("phimoe", tmp_path)
    scales = {"short_mscale": 1.2, "long_mscale": 1.3}
    path = with_rope(
        tmp_path, tmp_path, LONGROPE | scales, original_max_position_embeddings=TRAINED_LEN
    )
    with pytest.raises(ModelError, match="rope type 'longrope' of phimoe depends on the longest"):
        load(path)


def test_layer_types_are_fixed_each(tmp_path: Path) -> None:
    """A model whose layer types have ropes of their own."""
    kinds = {
        "full_attention": {**DYNAMIC, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    path = make_tiny_model("gemma3", tmp_path / "m", max_position_embeddings=TRAINED_LEN)
    engine = load(with_rope(path, path, kinds))
    shadow = Shadow(Reference(path), seed=0)
    length = engine.info.max_context_len
    sequence, ids = engine.store.open(length), shadow.random_tokens(length)
    rows = engine.forward([Append(sequence, ids[:30], 30)])
    rows = torch.cat([rows, engine.forward([Append(sequence, ids[30:], length - 30)])])
    shadow.assert_rows(rows, ids, "gemma3")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_fingerprint_depends_on_what_is_computed(kind: str, tmp_path: Path) -> None:
    """Replicas that would give other tokens are not taken for the same model."""
    path = make(kind, tmp_path)
    short, long, again = (
        load(path, max_model_len=length).info.model_fingerprint
        for length in (TRAINED_LEN, None, CONTEXT_LEN)
    )
    assert short != long == again
