"""What this machine's CPU can do, asked of torch itself."""

from __future__ import annotations

import torch


def cpu_has_prepacked(dtype: torch.dtype) -> bool:
    """Whether oneDNN prepacks linear weights of this dtype here (bfloat16 needs AVX-512)."""
    try:
        torch.ops.mkldnn._reorder_linear_weight.default(torch.zeros(8, 8, dtype=dtype), None)
    except (AttributeError, RuntimeError):  # a build without oneDNN; a CPU without the kernel
        return False
    return True
