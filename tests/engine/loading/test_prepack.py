"""Each linear layer gets the fastest kernel that computes it exactly, or keeps torch's."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from outrider.engine.loading import linear_kernels
from outrider.engine.loading.kernel_timing import MIN_WEIGHTS, by_preference, ranked
from outrider.engine.loading.linear_kernels import (
    FORBIDDABLE,
    FbgemmFloat16,
    LinearWeights,
    OneDnnFloat32,
    TorchLinear,
    TransposedLinear,
)
from outrider.engine.loading.prepack import choose_kernels
from tests.engine.cpu import cpu_has


@torch.inference_mode()
def test_replaces_linear_layers_in_place() -> None:
    """nn.Linear and GPT-2's Conv1D, but no subclasses; a tied embedding keeps its weight."""

    class Special(nn.Linear):
        pass

    model: Any = nn.ModuleDict(
        {
            "embedding": nn.Embedding(32, 16),
            "conv": Conv1D(24, 16),  # type: ignore[no-untyped-call]
            "inner": nn.Sequential(nn.Linear(24, 16), nn.ReLU()),
            "special": Special(16, 16),
            "head": nn.Linear(16, 32, bias=False),
        }
    )
    model["head"].weight = model["embedding"].weight
    ids = torch.arange(8)

    def run() -> torch.Tensor:
        out: torch.Tensor = model["embedding"](ids)
        for name in ("conv", "inner", "special", "head"):
            out = model[name](out)
        return out

    expected = run()
    assert choose_kernels(model) == {"onednn_float32": 3}
    assert isinstance(model["conv"], OneDnnFloat32)
    assert isinstance(model["inner"][0], OneDnnFloat32)
    assert type(model["special"]) is Special
    assert torch.allclose(run(), expected, atol=1e-5)
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert weights == {"embedding.weight", "special.weight"}, "the original weights must be freed"


def test_other_dtypes_keep_the_kernel_of_torch() -> None:
    model = nn.Sequential(nn.Linear(8, 8).half(), nn.Linear(8, 8).double())
    assert choose_kernels(model) == {"torch": 2}


def test_a_forbidden_kernel_is_not_used() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert choose_kernels(model, {"onednn_float32"}) == {"torch": 2}
    assert type(model[0]) is nn.Linear


def half_linear(out_features: int, in_features: int) -> nn.Linear:
    """A layer whose weights float16 holds exactly, in float32."""
    layer = nn.Linear(in_features, out_features).requires_grad_(False)
    layer.weight.copy_(layer.weight.half())
    return layer


def test_weights_exact_in_float16_are_held_in_16_bits(caplog: pytest.LogCaptureFixture) -> None:
    """Decided for each layer; the log has the number of the others."""
    model = nn.Sequential(half_linear(8, 8), nn.Linear(8, 8), half_linear(8, 8))
    exact = "fbgemm_float16" if cpu_has(FbgemmFloat16) else "onednn_float32"
    expected: Counter[str] = Counter({exact: 2})
    expected["onednn_float32"] += 1
    with caplog.at_level(logging.INFO):
        assert choose_kernels(model) == expected
    assert "not hold the weights of 1 of 3 linear layers exactly, for example 1:" in caplog.text
    assert model(torch.ones(2, 8)).shape == (2, 8)


def test_large_layers_are_timed_once_for_each_shape(caplog: pytest.LogCaptureFixture) -> None:
    shape = (256, MIN_WEIGHTS // 256)
    model = nn.Sequential(half_linear(*shape), half_linear(*shape), nn.Linear(256, 8))
    x = torch.linspace(-1, 1, 3 * shape[1]).reshape(3, -1)
    expected = model(x)
    with caplog.at_level(logging.INFO):
        kernels = choose_kernels(model)
    assert sum(kernels.values()) == 3
    assert caplog.text.count("kernels for 256 x 256, ms for a mean pass") == 1
    assert caplog.text.count("kernels for") == 1, "the small layer is not timed"
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_single_candidate_is_not_timed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose_kernels(nn.Sequential(half_linear(512, 512)), FORBIDDABLE)
    assert "kernels for" not in caplog.text


def test_the_fastest_kernel_is_first_and_a_preferred_one_before_its_equal() -> None:
    assert by_preference({"a": 1.08, "b": 1.0, "c": 0.5}) == [("c", 0.5), ("a", 1.08), ("b", 1.0)]
    weights = LinearWeights(torch.ones(512, 512))
    layers = [TransposedLinear(weights), TorchLinear(weights)]
    found = dict(ranked(layers, weights, from_memory=False))
    assert found.keys() == {"torch_transposed", "torch"}
    assert min(found.values()) > 0


def assert_falls_back(model: nn.Sequential, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that the layers keep torch's kernel and that the log has the reason."""
    with caplog.at_level(logging.WARNING):
        assert choose_kernels(model) == {"torch": len(model)}
    assert all(type(layer) is nn.Linear for layer in model)
    assert caplog.text.count("does not work on this CPU (layer 0)") == 1


def test_a_kernel_with_wrong_results_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        OneDnnFloat32, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features)
    )
    assert_falls_back(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), caplog)
    assert "onednn_float32 does not work" in caplog.text
    assert "differs by" in caplog.text


def test_missing_operators_fall_back_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(linear_kernels, "torch", _Without(torch, "ops"))
        assert_falls_back(nn.Sequential(nn.Linear(8, 8)), caplog)


@pytest.mark.parametrize("size", [8, 512], ids=["untimed", "timed"])
def test_without_fbgemm_the_next_kernel_is_used(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As on arm64, whose torch has another engine for quantised operators."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    try:
        kernels = choose_kernels(nn.Sequential(half_linear(size, size), half_linear(size, size)))
    finally:
        torch.backends.quantized.engine = engine
    assert sum(kernels.values()) == 2
    assert "fbgemm_float16" not in kernels
    assert caplog.text.count("fbgemm_float16 does not work on this CPU (layer 0)") == 1


class _Without:
    """A module that lacks one attribute."""

    def __init__(self, module: Any, missing: str) -> None:
        self._module, self._missing = module, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._module, name)
