"""Loading of engines: EngineInfo, and models and options that are refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from outrider.engine import Append, Engine, EngineOptions, load_engine
from outrider.engine.loading.placement import keep_row_index_on_cpu
from outrider.errors import ConfigError, ModelError
from tests.engine.reference import Reference, Shadow
from tests.tiny_models import make_tiny_draft, make_tiny_model

ModelDir = Callable[[str], Path]


def load(path: Path | str, **options: Any) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=256, **options))


def edit_config(source: Path, directory: Path, **fields: Any) -> Path:
    """Copy a model directory with changed fields in config.json."""
    shutil.copytree(source, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_info(family: str, engine_of: Callable[[str], Engine], model_dir: ModelDir) -> None:
    info = engine_of(family).info
    assert info.name == str(model_dir(family))
    assert info.architecture == family
    assert (info.vocab_size, info.max_context_len) == (256, 512)
    assert info.eos_token_ids == (255,)
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert info.kv_capacity_tokens == engine_of(family).store.capacity_tokens == 1024
    assert len(bytes.fromhex(info.model_fingerprint)) == 32
    assert 0 < info.self_test_max_difference < 1e-3
    parameters = transformers.AutoModelForCausalLM.from_pretrained(model_dir(family)).parameters()
    assert info.num_parameters == sum(p.numel() for p in parameters)


def test_several_eos_tokens(tmp_path: Path, model_dir: ModelDir) -> None:
    path = edit_config(model_dir("llama"), tmp_path / "m")
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load(path).info.eos_token_ids == (3, 5)


def test_fingerprint_is_of_the_weights(tmp_path: Path, model_dir: ModelDir) -> None:
    """The same for a copy and for another dtype; different for other weights."""
    original = load(model_dir("llama")).info.model_fingerprint
    copied = edit_config(model_dir("llama"), tmp_path / "copy")
    assert load(copied).info.model_fingerprint == original
    assert load(copied, dtype="bfloat16").info.model_fingerprint == original
    assert load(copied, prepack=False).info.model_fingerprint == original
    noisy = make_tiny_draft(model_dir("llama"), tmp_path / "noisy", noise=0.1)
    assert load(noisy).info.model_fingerprint != original


def test_budget_from_free_memory(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter of what the largest pass leaves of the free RAM, at most 4 GiB."""
    bytes_per_token = 3 * 2 * (16 + 16) * 4
    monkeypatch.setattr("outrider.engine.kv.budget._available_ram", lambda: 1 << 30)
    with caplog.at_level(logging.INFO, "outrider"):
        engine = load_engine(EngineOptions(str(model_dir("llama"))))
    (line,) = [text for text in caplog.messages if text.startswith("a pass over 8320 tokens with")]
    needed = int(line.split()[-2]) << 20
    assert needed < 1 << 30, line
    expected = ((1 << 30) - 1.1 * needed) / 4 / bytes_per_token
    assert abs(engine.store.capacity_tokens - expected) < (1 << 20) / bytes_per_token
    monkeypatch.setattr("outrider.engine.kv.budget._available_ram", lambda: 1 << 50)
    engine = load_engine(EngineOptions(str(model_dir("llama"))))
    assert engine.store.capacity_tokens == (4 << 30) // bytes_per_token // 16 * 16
    monkeypatch.setattr("outrider.engine.kv.budget._available_ram", lambda: 1 << 10)
    with pytest.raises(ModelError, match="no memory left"):
        load_engine(EngineOptions(str(model_dir("llama"))))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: the directory does not exist"):
        load(name)


def test_hub_name_while_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"nobody/nothing: cannot load .*offline.*no local directory"
    ):
        load("nobody/nothing")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file: not a directory"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "no_such_model"}',
        '{"model_type": "llama", "hidden_size": "many"}',
    ],
)
def test_unusable_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=f"{tmp_path}: cannot load its configuration"):
        load(tmp_path)


def test_truncated_weights(tmp_path: Path, model_dir: ModelDir) -> None:
    path = edit_config(model_dir("llama"), tmp_path / "m")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=f"{path}: cannot load its weights"):
        load(path)
    weights.unlink()
    with pytest.raises(ModelError, match=f"{path}: cannot load its weights"):
        load(path)


def test_missing_and_misshapen_weights(tmp_path: Path, model_dir: ModelDir) -> None:
    """transformers would initialise missing weights randomly and only warn."""
    deeper = edit_config(model_dir("llama"), tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks 9 weights, for example model\.layers\.3"):
        load(deeper)
    wider = edit_config(model_dir("llama"), tmp_path / "wider", intermediate_size=100)
    with pytest.raises(ModelError, match="wider: cannot load its weights"):
        load(wider)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "int8"}, "dtype: 'int8' is unknown; expected auto, float32"),
        ({"device": "gpu"}, "device: 'gpu' is unknown; expected auto, cpu"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"kv_cache_tokens": 3}, "kv_cache_tokens: 3 is too small; at least 16"),
        ({"num_threads": 0}, "num_threads: 0 is too small; at least 1"),
        (
            {"forbid_kernels": frozenset({"mkl"})},
            "forbid_kernels: 'mkl' is unknown; expected fbgemm_float16, onednn",
        ),
    ],
)
def test_invalid_options_are_refused(
    model_dir: ModelDir, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        load_engine(EngineOptions(str(model_dir("llama")), **options))


def test_an_inflated_engine_gives_the_same_logits(model_dir: ModelDir, tmp_path: Path) -> None:
    small = make_tiny_model("llama", tmp_path / "m", tie_word_embeddings=True)
    large = load(small, inflate_parameters=3_000_000)
    assert large.info.num_parameters > 2_000_000
    assert large.info.model_fingerprint != load(small).info.model_fingerprint
    rows = []
    for engine in (large, load(small)):
        sequence = engine.store.open(8)
        rows.append(engine.forward([Append(sequence, [1, 2, 3, 4, 5, 6, 7, 8], 8)]))
    assert torch.allclose(rows[0], rows[1], atol=1e-3)
    with pytest.raises(ModelError, match="cannot be inflated to 10"):
        load(small, inflate_parameters=10)


def test_device_map(model_dir: ModelDir) -> None:
    """accelerate's placement, as far as a machine without a GPU can test it."""
    engine = load(model_dir("llama"), device_map="auto")
    sequence = engine.store.open(8)
    assert engine.forward([Append(sequence, [1, 2, 3], 2)]).shape == (2, 256)


def test_placement_hooks_keep_the_row_index_on_the_cpu(model_dir: ModelDir) -> None:
    engine = load(model_dir("llama"), prepack=False)
    module = engine._model.module
    accelerate.dispatch_model(module, {"": "cpu"}, main_device="cpu", force_hooks=True)
    keep_row_index_on_cpu(module)
    assert "logits_to_keep" in module._hf_hook.skip_keys
    sequence = engine.store.open(8)
    assert engine.forward([Append(sequence, [1, 2, 3], 2)]).shape == (2, 256)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_cuda(model_dir: ModelDir, family: str, device_map: str | None) -> None:
    engine = load(model_dir(family), dtype="float32", device="cuda", device_map=device_map)
    assert engine.store.keys[0].device.type == "cuda"
    shadow = Shadow(Reference(model_dir(family)), seed=0)
    sequence, tokens = engine.store.open(40), shadow.random_tokens(40)
    for start, stop in [(0, 30), (30, 31), (31, 36), (36, 40)]:
        rows = engine.forward([Append(sequence, tokens[start:stop], stop - start)])
        expected = Reference(model_dir(family)).logits(tokens[:stop])[start:]
        assert torch.allclose(rows.cpu(), expected, atol=1e-2)
