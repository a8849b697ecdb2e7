"""Linear kernels equal torch's, for any number of rows; float16 weights are proved exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from outrider.engine.loading.linear_kernels import (
    CANDIDATES,
    FbgemmFloat16,
    LinearKernel,
    LinearWeights,
    OneDnnBfloat16,
    OneDnnFloat32,
    TransposedLinear,
    built,
    half_exponent,
)
from tests.engine.cpu import cpu_has


@pytest.fixture(params=CANDIDATES, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> type[LinearKernel]:
    kernel: type[LinearKernel] = request.param
    return kernel


def random_weights(kernel: type[LinearKernel], *, bias: bool) -> LinearWeights:
    """Weights that the kernel suits: float16 for FBGEMM, bfloat16 for oneDNN's bfloat16."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if kernel is OneDnnBfloat16 else torch.float32
    weight = torch.randn(48, 40, generator=generator).half().to(dtype)
    offset = torch.randn(48, generator=generator).to(dtype) if bias else None
    return LinearWeights(weight, offset, half_exponent(weight))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_equals_plain_linear(kernel: type[LinearKernel], bias: bool) -> None:
    """Where the CPU lacks the kernel, building it raises what `choose_kernels` catches."""
    weights = random_weights(kernel, bias=bias)
    assert kernel.suits(weights)
    if not cpu_has(kernel):
        with pytest.raises((RuntimeError, AttributeError, NotImplementedError)):
            built(kernel, weights)
        return
    layer = built(kernel, weights)
    tolerance = {"rtol": 2e-2 if kernel is OneDnnBfloat16 else 1e-5, "atol": 1e-4}
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 33, 40, generator=generator).to(weights.weight.dtype)
    for rows in (0, 1, 2, 5, 33):
        expected = functional.linear(x[:, :rows], weights.weight, weights.bias)
        got = layer(x[:, :rows])
        assert got.shape == (1, rows, 48)
        assert torch.allclose(got, expected, **tolerance)


def test_kernels_refuse_other_dtypes() -> None:
    for dtype in (torch.float16, torch.float64):
        weights = LinearWeights(torch.zeros(8, 8, dtype=dtype))
        assert [k.name for k in CANDIDATES if k.suits(weights)] == ["torch"]
    single = LinearWeights(torch.zeros(8, 8), None, 0)
    suiting = {kernel for kernel in CANDIDATES if kernel.suits(single)}
    assert suiting >= {FbgemmFloat16, OneDnnFloat32, TransposedLinear}
    assert OneDnnBfloat16 not in suiting
    assert not FbgemmFloat16.suits(LinearWeights(torch.zeros(8, 8))), "not proved exact"


def all_finite(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit dtype, as float32."""
    numbers = torch.arange(1 << 16).to(torch.int16).view(dtype)
    return numbers[torch.isfinite(numbers)].float()


def test_every_float16_weight_is_computed_exactly() -> None:
    """Unit vectors as input give the weights themselves, subnormal ones too."""
    weight = all_finite(torch.float16).reshape(-1, 64)
    assert half_exponent(weight) == 0
    if not cpu_has(FbgemmFloat16):
        return
    layer = FbgemmFloat16(LinearWeights(weight, None, 0))
    for rows in (1, 5, 64):
        assert torch.equal(layer(torch.eye(64)[:rows]), weight.t()[:rows])


def usual_bfloat16() -> torch.Tensor:
    """All bfloat16 numbers from 2**-26 to 1: wider than float16, as in real checkpoints."""
    numbers = all_finite(torch.bfloat16)
    return numbers[(numbers.abs() >= 2**-26) & (numbers.abs() < 1)].reshape(-1, 64)


def test_bfloat16_weights_are_exact_after_scaling() -> None:
    weight = usual_bfloat16()
    assert not torch.equal(weight.half().float(), weight)
    exponent = half_exponent(weight)
    assert exponent == 15
    if not cpu_has(FbgemmFloat16):
        return
    bias = torch.linspace(-3, 3, len(weight))
    layer = FbgemmFloat16(LinearWeights(weight, bias, exponent))
    assert torch.equal(layer(torch.eye(64)), weight.t() + bias)


def inexact() -> Iterator[tuple[str, torch.Tensor]]:
    exact = torch.ones(3, 5)
    for name, value in (
        ("12 significant bits", 1 + 2**-11),
        ("infinite", float("inf")),
        ("not a number", float("nan")),
    ):
        weight = exact.clone()
        weight[2, 4] = value
        yield name, weight
    yield "too wide a range", torch.tensor([[1.0, 2**-40]])
    yield "beyond any scale", torch.tensor([[2.0**100]])
    yield "no weights", torch.empty(3, 0)
    yield "16 bits already", torch.ones(2, 2, dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "weight"), list(inexact()), ids=lambda value: str(value)[:20])
def test_inexact_weights_are_found(name: str, weight: torch.Tensor) -> None:
    assert half_exponent(weight) is None, name


def test_exponents_of_exact_weights() -> None:
    assert half_exponent(torch.zeros(3, 5)) == 0
    assert half_exponent(torch.full((2, 3), 2.0**20)) == -6
    assert half_exponent(torch.full((2, 3), 2.0**-30)) == 44
    assert half_exponent(torch.ones(4, 6).t()) == 0, "a transposed view, as GPT-2's"


def test_a_wrong_result_for_several_rows_is_found() -> None:
    """A kernel must agree with itself for one row and for several."""

    class RightForOneRow(TransposedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out if x.shape[-2] == 1 else out * 1.001

    weights = random_weights(TransposedLinear, bias=True)
    built(RightForOneRow, weights, (1,))
    with pytest.raises(RuntimeError, match="the result for 3 rows differs by"):
        built(RightForOneRow, weights)
