"""Models that this engine would serve incorrectly are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from outrider.engine import Engine, EngineOptions, load_engine
from outrider.engine.attention import interface as attention
from outrider.errors import InternalError, ModelError


def load(path: Path) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=256))


def save(directory: Path, config: Any) -> Path:
    """Save a random model with this configuration."""
    logs: Any = transformers.utils.logging
    logs.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
            "bloom does not use transformers' attention interface",
        ),
        (
            transformers.GPTNeoConfig(
                vocab_size=64, hidden_size=32, num_layers=2, num_heads=2,
                attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
            ),
            "gpt_neo does not use transformers' attention interface",
        ),
        (
            transformers.FalconConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
            ),
            "falcon does not use transformers' attention interface",
        ),
        (
            transformers.Llama4TextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                num_local_experts=1, pad_token_id=None,
            ),
            "chunked_attention",
        ),
        (
            transformers.Qwen3NextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
                num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=0,
                linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                linear_value_head_dim=16,
            ),
            "linear_attention",
        ),
        (
            transformers.BertConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, is_decoder=False, architectures=["BertForMaskedLM"],
            ),
            "BertForMaskedLM is not a causal language model",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_unsupported_architectures_are_refused(tmp_path: Path, config: Any, why: str) -> None:
    directory = save(tmp_path / "model", config)
    if config.model_type == "bert":  # save_pretrained writes the class it was saved from
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}
        path.write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=why):
        load(directory)


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    with pytest.raises(ModelError, match="is not causal"):
        load(save(tmp_path / "bert", config))


def test_self_test_refuses_wrong_attention(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose logits differ from eager attention are not served, whatever the reason."""
    monkeypatch.setattr(
        "outrider.engine.attention.torch_backend.attend_fused",
        lambda query, key, value, mask, scaling: attention.attend_fused(
            query, key, value, None, scaling
        ),
    )
    with pytest.raises(ModelError, match="not served correctly"):
        load(model_dir("llama"))


def test_a_model_call_outside_forward_is_refused(engine_of: Callable[[str], Engine]) -> None:
    module = engine_of("llama")._model.module
    with pytest.raises(InternalError, match=r"outside Engine\.forward"):
        module(torch.tensor([[1, 2]]), use_cache=False)
