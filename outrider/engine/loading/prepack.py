"""Linear layers on CPU: oneDNN kernels with prepacked weights, or torch's own kernel.

Without prepacking, a float32 block of two tokens costs twice as much as one token, because torch
leaves its matrix-vector path. With it, a block of five costs about 1.2 times one token, so
speculative decoding pays on a CPU. The operators are internal to torch but long-standing (its
compiler emits them). So each layer is tried once at load, and keeps torch's kernel if the operator
is missing, fails on this CPU or gives another result.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from outrider.engine.loading.quantized import is_plain

_log = logging.getLogger(__name__)

TORCH_KERNEL = "torch"
"""Name of the fallback kernel: `torch.nn.functional.linear`."""

_KERNELS = {torch.float32: "onednn_float32", torch.bfloat16: "onednn_bfloat16"}

PREPACKED_KERNELS = tuple(_KERNELS.values())
"""Names of the prepacked kernels. oneDNN needs AVX-512 for bfloat16."""

# Relative to the largest output; oneDNN and torch sum in different orders.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class PrepackedLinear(nn.Module):
    """y = x W^T + b for float32 or bfloat16 x [..., in_features] on CPU. Inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight`: [out_features, in_features]; it is copied, and the original can be freed."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # Not a buffer: .to() would cast and move it, which the layout does not allow.
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, None)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, self._packed, self.bias, "none", [], "")
        return out


def choose_kernels(model: nn.Module, forbidden: Collection[str] = ()) -> dict[str, int]:
    """Prepack the linear layers of `model` in place; return the number of layers by kernel.

    A layer keeps torch's kernel on other devices than the CPU, and if the kernel of its dtype is in
    `forbidden` or fails on this CPU. A failure is logged, and the kernel is not tried again.
    Subclasses of nn.Linear (quantised, adapted) are neither changed nor counted. The weights of
    replaced layers are freed.
    """
    num_layers: Counter[str] = Counter()
    unusable = set(forbidden)
    for name in [
        name for name, _ in model.named_modules()
    ]:  # names, not modules: references would keep weights
        child = model.get_submodule(name)
        weight = _linear_weight(child)
        if weight is None:
            continue
        kernel = _KERNELS.get(weight.dtype) if weight.device.type == "cpu" else None
        if kernel is not None and kernel not in unusable:
            try:
                model.set_submodule(name, _try(weight, getattr(child, "bias", None)))
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                _log.warning("%s does not work on this CPU (layer %s): %s", kernel, name, error)
                unusable.add(kernel)
            else:
                num_layers[kernel] += 1
                continue
        num_layers[TORCH_KERNEL] += 1
    if num_layers.total() > num_layers[TORCH_KERNEL]:
        # The other parameters are views of the mapped checkpoint file and would keep it in memory.
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:
                parameter.data = parameter.data.clone()
    return dict(num_layers)


def _linear_weight(module: nn.Module) -> torch.Tensor | None:
    """Weight as [out, in] if the module is exactly a linear layer that can be prepacked."""
    kind: Any = type(module)
    if kind in (nn.Linear, Conv1D) and not is_plain(module):
        return None
    if kind is nn.Linear:
        weight = module.weight
    elif kind is Conv1D:  # GPT-2 stores [in, out]
        weight = module.weight.t()  # type: ignore[operator]
    else:
        return None
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


@torch.inference_mode()
def _try(weight: torch.Tensor, bias: torch.Tensor | None) -> PrepackedLinear:
    """Prepacked layer, compared once with torch's own. Raises RuntimeError if it differs."""
    packed = PrepackedLinear(weight, bias)
    for rows in (1, 3):
        x = torch.linspace(-1.0, 1.0, rows * weight.shape[1]).reshape(rows, -1).to(weight.dtype)
        expected = functional.linear(x, weight, bias).float()
        difference = (packed(x).float() - expected).abs().max()
        if not difference <= _TOLERANCE[weight.dtype] * expected.abs().max().clamp_min(1e-3):
            raise RuntimeError(f"oneDNN's result differs by {difference:.2g}")
    return packed
