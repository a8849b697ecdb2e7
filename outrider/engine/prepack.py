"""Linear layers whose weights lie in memory as oneDNN wants them, once, instead of per call.

CPU only. Without it a float32 block of two tokens costs twice one token (torch leaves its
matrix-vector path); with it a block of five costs about 1.2 times one, which is what makes
speculative decoding pay on a CPU. The operators are internal to torch but long-standing (its
compiler emits them), so everything is tried on each weight first and left alone if it differs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)

# Of the largest output value; oneDNN and torch add up in different orders.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class PrepackedLinear(nn.Module):
    """y = x W^T + b for float32 or bfloat16 x [..., in_features] on CPU. Inference only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out_features, in_features]; it is copied, the original can be freed."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # A plain attribute: buffers would be cast and moved by .to(), which the layout forbids.
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, None)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, self._packed, self.bias, "none", [], "")
        return out


def prepack_linears(model: nn.Module) -> int:
    """Replaces the linear layers of `model` in place; how many were. Frees their weights.

    Subclasses of nn.Linear (quantised, adapted) are left as they are, and so is all that
    follows the first layer for which the operators fail or differ: said in the log.
    """
    num_replaced = 0
    for name in [name for name, _ in model.named_modules()]:  # holding none: they are freed
        child = model.get_submodule(name)
        weight = _linear_weight(child)
        if weight is None:
            continue
        try:
            packed = _try(weight, getattr(child, "bias", None))
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            _log.warning("prepacked linear layers are off from %s on: %s", name, error)
            break
        model.set_submodule(name, packed)
        num_replaced += 1
    if num_replaced:
        # What is left are views of the mapped checkpoint file, which would stay in memory whole.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return num_replaced


def _linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight as [out, in] if the module is a plain linear layer that can be prepacked."""
    kind: Any = type(module)
    if kind is nn.Linear:
        weight = module.weight
    elif kind is Conv1D:  # GPT-2 stores [in, out]
        weight = module.weight.t()  # type: ignore[operator]
    else:
        return None
    assert isinstance(weight, torch.Tensor)
    usable = weight.dtype in _DTYPES and weight.device.type == "cpu"
    return weight.detach() if usable else None


@torch.inference_mode()
def _try(weight: torch.Tensor, bias: torch.Tensor | None) -> PrepackedLinear:
    """The prepacked layer, compared once with the plain one. Raises RuntimeError if it differs."""
    packed = PrepackedLinear(weight, bias)
    for rows in (1, 3):
        x = torch.linspace(-1.0, 1.0, rows * weight.shape[1]).reshape(rows, -1).to(weight.dtype)
        expected = functional.linear(x, weight, bias).float()
        difference = (packed(x).float() - expected).abs().max()
        if not difference <= _TOLERANCE[weight.dtype] * expected.abs().max().clamp_min(1e-3):
            raise RuntimeError(f"oneDNN's result differs by {difference:.2g}")
    return packed
