"""CPU kernels for linear layers: one class per kernel, all with the same interface.

Which kernel serves a layer is chosen in `prepack.py`. The operators of oneDNN and FBGEMM are
internal to torch but long-standing. They are missing or fail on some CPUs and builds (FBGEMM on
arm64, oneDNN's bfloat16 without AVX-512), so each is tried before use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

# Relative to the largest output; kernels sum in different orders.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# Significant bits of a float32 that float16 lacks.
_LOST_BITS = 0x1FFF
# Beyond this scale, scaled activations could leave the range of float32.
_MAX_EXPONENT = 64
# Rows of a weight converted at once by the proof of exactness: bounds its memory.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class LinearWeights:
    """Weights of one linear layer. `weight`: [out_features, in_features]; `bias`: [out_features].

    `half_exponent`: see `half_exponent`; None: float16 does not hold the weights exactly.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    half_exponent: int | None = None

    def first_rows(self, num_rows: int) -> LinearWeights:
        """The layer that computes the first `num_rows` outputs only."""
        bias = None if self.bias is None else self.bias[:num_rows]
        return replace(self, weight=self.weight[:num_rows], bias=bias)


class LinearKernel(nn.Module):
    """y = x W^T + b for x [..., in_features] on CPU, in the dtype of the weights. Inference only.

    The constructor copies the weight, and the original can be freed. It raises RuntimeError,
    NotImplementedError or AttributeError where the operator is missing.
    """

    name: ClassVar[str]

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__()
        self.out_features, self.in_features = weights.weight.shape
        self.bias = weights.bias

    @classmethod
    def suits(cls, weights: LinearWeights) -> bool:
        """Whether the kernel computes this layer exactly, up to the rounding of its dtype."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class TorchLinear(LinearKernel):
    """torch's own kernel, on the original weight. Slow for 2 to 16 tokens in float32."""

    name = "torch"

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__(weights)
        self._weight = weights.weight

    @classmethod
    def suits(cls, weights: LinearWeights) -> bool:
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self.bias)


class TransposedLinear(LinearKernel):
    """torch's product with a transposed copy: BLAS streams such a weight faster on some CPUs."""

    name = "torch_transposed"

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__(weights)
        self._weight = weights.weight.t().contiguous()

    @classmethod
    def suits(cls, weights: LinearWeights) -> bool:
        return weights.weight.dtype == torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(x, self._weight)
        return out if self.bias is None else out.add_(self.bias)


class _OneDnnLinear(LinearKernel):
    """oneDNN's product with a weight in its own layout.

    A float32 block of five tokens takes about 1.2 times one token; with torch's kernel two tokens
    already take twice as long as one.
    """

    dtype: ClassVar[torch.dtype]

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__(weights)
        # Not a buffer: .to() would cast and move it, which the layout does not allow.
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weights.weight, None)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    @classmethod
    def suits(cls, weights: LinearWeights) -> bool:
        return weights.weight.dtype == cls.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, self._packed, self.bias, "none", [], "")
        return out


class OneDnnFloat32(_OneDnnLinear):
    """oneDNN in float32."""

    name = "onednn_float32"
    dtype = torch.float32


class OneDnnBfloat16(_OneDnnLinear):
    """oneDNN in bfloat16, which needs AVX-512 or AVX-NE-CONVERT."""

    name = "onednn_bfloat16"
    dtype = torch.bfloat16


class FbgemmFloat16(LinearKernel):
    """FBGEMM's product with a float16 weight; input, output and sums are float32.

    Half the memory traffic of float32, and exact: only for weights that float16 holds exactly,
    after scaling by a power of two where needed. The input is scaled back, which rounds nothing.
    """

    name = "fbgemm_float16"

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__(weights)
        assert weights.half_exponent is not None, "checked by `suits`"
        scale = 2.0**weights.half_exponent
        scaled = weights.weight.contiguous() if scale == 1.0 else weights.weight * scale
        self._packed = torch.ops.quantized.linear_prepack_fp16.default(scaled, weights.bias)
        self._linear = torch.ops.quantized.linear_dynamic_fp16.default
        self._input_scale = 1.0 / scale

    @classmethod
    def suits(cls, weights: LinearWeights) -> bool:
        return weights.weight.dtype == torch.float32 and weights.half_exponent is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._input_scale != 1.0:
            x = x * self._input_scale
        out: torch.Tensor = self._linear(x, self._packed)
        return out


CANDIDATES: tuple[type[LinearKernel], ...] = (
    FbgemmFloat16, OneDnnFloat32, OneDnnBfloat16, TorchLinear, TransposedLinear
)  # fmt: skip
"""All kernels, in the order of preference where they are equally fast or not timed."""

FORBIDDABLE = tuple(kernel.name for kernel in CANDIDATES if kernel is not TorchLinear)
"""Names of the kernels that may be forbidden. torch's own is the fallback."""


@torch.inference_mode()
def half_exponent(weight: torch.Tensor) -> int | None:
    """Exponent e such that float16 holds every element of float32 `weight` * 2**e exactly.

    0 wherever possible. bfloat16 checkpoints need another: their smallest weights are below the
    normal range of float16. None if there is no such e: an element has more than 11 significant
    bits, is not finite, or the range of the elements is too wide.
    """
    if weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    chunks = torch.split(weight, max(1, _CHUNK_WEIGHTS // weight.shape[1]))
    largest = 0.0
    for chunk in chunks:
        if (chunk.view(torch.int32) & _LOST_BITS).any():
            return None
        low, high = chunk.aminmax()
        largest = max(largest, float(-low), float(high))
        if not math.isfinite(largest):
            return None
    highest = 15 - math.frexp(largest)[1]
    for exponent in (0, highest):
        if abs(exponent) <= _MAX_EXPONENT and all(_is_half(c * 2.0**exponent) for c in chunks):
            return exponent
    return None


def _is_half(values: torch.Tensor) -> bool:
    return values.half().float().equal(values)


@torch.inference_mode()
def built(
    kernel: type[LinearKernel], weights: LinearWeights, row_counts: Iterable[int] = (1, 3)
) -> LinearKernel:
    """The layer on this kernel, compared with torch's for inputs of these numbers of rows.

    Raises RuntimeError if a result differs by more than rounding: one row (decoding) and several
    (verification) must agree. See `LinearKernel` for other errors.
    """
    layer = kernel(weights)
    dtype = weights.weight.dtype
    for rows in row_counts:
        x = torch.linspace(-1.0, 1.0, rows * layer.in_features).reshape(rows, -1).to(dtype)
        expected = functional.linear(x, weights.weight, weights.bias).float()
        difference = (layer(x).float() - expected).abs().max()
        if not difference <= _TOLERANCE[dtype] * expected.abs().max().clamp_min(1e-3):
            raise RuntimeError(f"the result for {rows} rows differs by {difference:.2g}")
    return layer
