"""Quantised checkpoints: served as transformers computes them, or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.bitnet import pack_weights

from outrider.engine import Append, EngineOptions, load_engine
from outrider.engine.attention import interface as attention
from outrider.engine.loading import prepack
from outrider.errors import ModelError
from outrider.model_server.load_engine import load_served_engine
from outrider.settings.services import TargetConfig
from tests.engine.reference import Reference
from tests.families import save_family
from tests.tiny_models import make_tiny_model

BLOCK = 32
_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}
# Kinds whose packages this project does not install, and what the refusal names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
    "gptq": ({"bits": 4, "group_size": 128, "desc_act": False}, "optimum"),
    "compressed-tensors": (
        {"format": "pack-quantized", "config_groups": {"group_0": _GROUP}},
        "compressed-tensors",
    ),
    "bitsandbytes": ({"load_in_4bit": True}, "bitsandbytes"),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao"),
    "fbgemm_fp8": ({}, "requires a GPU"),
    "next_year": ({}, "Unknown quantization type"),
}


def quantise(directory: Path, fields: dict[str, Any]) -> Path:
    """Write `quantization_config`, as published checkpoints have it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": fields}))
    return directory


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("quantized") / "m")


@pytest.mark.parametrize("method", REFUSED)
def test_a_missing_package_or_device_is_named(method: str, plain_dir: Path) -> None:
    fields, missing = REFUSED[method]
    quantise(plain_dir, {"quant_method": method, **fields})
    with pytest.raises(ModelError, match=f"quantised with {method}, .*{missing}"):
        load_engine(EngineOptions(str(plain_dir), kv_cache_tokens=256))


def test_bitsandbytes_is_named_where_the_checkpoint_does_not(plain_dir: Path) -> None:
    quantise(plain_dir, {"load_in_8bit": True})
    with pytest.raises(ModelError, match="quantised with bitsandbytes"):
        load_engine(EngineOptions(str(plain_dir), kv_cache_tokens=256))


def write_fp8(directory: Path) -> Path:
    """Round the weights to blocks of FP8 as DeepSeek and Qwen publish them.

    Returns the directory of the plain model with the rounded weights.
    """
    rounded = make_tiny_model("llama", directory.parent / "rounded")
    weights = load_file(directory / "model.safetensors")
    stored, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = (blocks.abs().amax((1, 3)) / 448).bfloat16().float()
            values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = values.reshape(rows, columns)
            stored[name.replace("weight", "weight_scale_inv")] = scales
            plain[name] = (values.float() * scales[:, None, :, None]).reshape(rows, columns)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, rounded / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    quantise(directory, {**method, "activation_scheme": "dynamic"})
    return rounded


def test_fp8_blocks_are_served_without_a_gpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers expands them; the logits are those of the rounded weights."""
    path = make_tiny_model("llama", tmp_path / "fp8")
    rounded = write_fp8(path)
    with caplog.at_level(logging.WARNING, "outrider"):
        engine = load_engine(EngineOptions(str(path), kv_cache_tokens=256))
    assert f"{path}: quantised with fp8, expanded to float32 on this device" in caplog.text
    token_ids = list(range(40))
    sequence = engine.store.open(40)
    logits = engine.forward([Append(sequence, token_ids, 40)])
    expected = Reference(rounded).logits(token_ids)
    assert float((logits - expected).abs().max()) < 1e-3
    assert float((Reference(rounded).logits([1, 2]) - expected[:2]).abs().max()) > 0.1


def write_ternary(directory: Path) -> Path:
    """Pack the weights to two bits as BitNet's: the one method that needs no package."""
    weights = load_file(directory / "model.safetensors")
    stored = dict(weights)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            scale = weight.abs().mean()
            values = (weight / scale).round().clamp(-1, 1).to(torch.int8)
            stored[name] = pack_weights(values)
            stored[name.replace("weight", "weight_scale")] = (1 / scale).reshape(1)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return quantise(directory, {"quant_method": "bitnet"})


@torch.compiler.set_stance("force_eager")  # transformers compiles the unpacking, in 15 s
def test_a_quantised_model_is_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers stay as they are; its activations are rounded, so logits differ more."""
    path = write_ternary(make_tiny_model("llama", tmp_path / "m"))
    served = load_served_engine(TargetConfig(model=str(path), kv_cache_tokens=256))
    assert served.model.quantization == "bitnet"
    assert sum(served.model.linear_kernels.values()) == 1, "lm_head"
    engine: Any = served.engine
    sequence, token_ids = engine.store.open(40), list(range(40))
    logits = engine.forward([Append(sequence, token_ids, 40)])
    difference = (logits - Reference(path).logits(token_ids)).abs().mean()
    assert float(difference) < 0.1 * float(logits.std())
    monkeypatch.setattr(
        "outrider.engine.attention.torch_backend.attend_fused",
        lambda query, key, value, mask, scaling: attention.attend_fused(
            query, key, value, None, scaling
        ),
    )
    with pytest.raises(ModelError, match="not served correctly"):
        load_engine(EngineOptions(str(path), kv_cache_tokens=256))


def test_mxfp4_experts_are_served_without_triton(tmp_path: Path) -> None:
    """As gpt-oss is published: blocks of 32 four-bit values with a scale."""
    save_family("gpt_oss", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_in, num_out = stored.pop(name).shape
        shape = (num_experts, num_out, num_in // BLOCK)
        blocks = torch.randint(256, (*shape, BLOCK // 2), generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"] = blocks
        stored[f"{name}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    quantise(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    engine = load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
    sequence, token_ids = engine.store.open(40), list(range(40))
    logits = engine.forward([Append(sequence, token_ids, 40)])
    assert float((logits - Reference(tmp_path).logits(token_ids)).abs().max()) < 1e-4


class _Packed(torch.Tensor):
    """A weight that computes in its own way, as torchao's."""


def _subclassed(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Packed))


def _own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def _with_scheme(layer: nn.Linear) -> None:
    layer.quantization_scheme = "int8"  # type: ignore[assignment]


@pytest.mark.parametrize("change", [_subclassed, _own_forward, _with_scheme])
def test_prepacking_leaves_quantised_layers_alone(change: Callable[[nn.Linear], None]) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    quantised: Any = model[1]
    change(quantised)
    weight = quantised.weight
    kernels = prepack.choose_kernels(model)
    assert sum(kernels.values()) == 1
    assert model[1] is quantised
    assert quantised.weight is weight
