"""How many tokens' keys and values fit into the memory that is free now.

Knows devices and bytes; nothing about pages or models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from outrider.engine.kv.store import LayerLayout

# On CPU other programs want memory too; on CUDA 20% is left for activations.
_CPU_SHARE = 0.25
_CPU_MOST_BYTES = 4 << 30
_CUDA_SHARE = 0.8


def affordable_tokens(layers: Seq[LayerLayout]) -> int:
    """Tokens for which all layers' keys and values fit on their devices."""
    needed: dict[torch.device, int] = defaultdict(int)
    for layer in layers:
        needed[layer.device] += layer.bytes_per_token
    return min(_budget_bytes(device) // per_token for device, per_token in needed.items())


def _budget_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(free_bytes(device) * _CUDA_SHARE)
    return min(int(free_bytes(device) * _CPU_SHARE), _CPU_MOST_BYTES)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available_ram()


def _available_ram() -> int:
    """Bytes of RAM that can still be used, within the container's limit if there is one."""
    available = 8 << 30  # a machine that tells nothing
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
