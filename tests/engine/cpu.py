"""CPU features of this machine, as torch reports them."""

from __future__ import annotations

import torch


def cpu_has_prepacked(dtype: torch.dtype) -> bool:
    """Whether oneDNN can prepack linear weights of this dtype here (bfloat16 needs AVX-512)."""
    try:
        torch.ops.mkldnn._reorder_linear_weight.default(torch.zeros(8, 8, dtype=dtype), None)
    except (AttributeError, RuntimeError):  # a build without oneDNN; a CPU without the kernel
        return False
    return True
