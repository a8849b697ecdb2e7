"""CPU features of this machine, as torch reports them."""

from __future__ import annotations

import torch

from outrider.engine.loading.linear_kernels import LinearKernel, LinearWeights, OneDnnBfloat16


def cpu_has(kernel: type[LinearKernel]) -> bool:
    """Whether the kernel's operators work here.

    bfloat16 needs AVX-512; a build may lack oneDNN or, as on arm64, FBGEMM.
    """
    dtype = torch.bfloat16 if kernel is OneDnnBfloat16 else torch.float32
    try:
        kernel(LinearWeights(torch.zeros(8, 8, dtype=dtype), None, 0))
    except (AttributeError, RuntimeError):
        return False
    return True
