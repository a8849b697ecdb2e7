"""Prepacked linear layers equal plain ones, and fall back to torch where they cannot run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from outrider.engine.loading import prepack
from outrider.engine.loading.prepack import PrepackedLinear, choose_kernels
from tests.engine.cpu import cpu_has_prepacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
def test_equals_plain_linear(
    dtype: torch.dtype, bias: bool, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    if not cpu_has_prepacked(dtype):
        assert_falls_back(nn.Sequential(nn.Linear(40, 48, bias=bias).to(dtype)), caplog)
        return
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 40, generator=generator).to(dtype)
    offset = torch.randn(48, generator=generator).to(dtype) if bias else None
    x = torch.randn(1, rows, 40, generator=generator).to(dtype)
    got = PrepackedLinear(weight, offset)(x)
    expected = functional.linear(x, weight, offset)
    assert got.shape == expected.shape == (1, rows, 48)
    assert torch.allclose(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


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
    assert isinstance(model["conv"], PrepackedLinear)
    assert isinstance(model["inner"][0], PrepackedLinear)
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
        PrepackedLinear, "forward", lambda self, x: torch.zeros(*x.shape[:-1], self.out_features)
    )
    assert_falls_back(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), caplog)
    assert "oneDNN's result differs" in caplog.text


def test_missing_operators_fall_back_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepack, "torch", _Without(torch, "ops"))
        assert_falls_back(nn.Sequential(nn.Linear(8, 8)), caplog)


class _Without:
    """A module that lacks one attribute."""

    def __init__(self, module: Any, missing: str) -> None:
        self._module, self._missing = module, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._module, name)
