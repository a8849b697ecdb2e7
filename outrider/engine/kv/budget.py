"""KV memory budget: how many tokens' keys and values fit into the memory that is free now."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from outrider.engine.kv.store import LayerLayout

# On CPU, memory is shared with other programs.
_CPU_SHARE = 0.25
_CPU_MAX_BYTES = 4 << 30
# On CUDA, left of the whole memory beside weights, KV and the largest pass: graphs, fragmentation,
# other programs. And the share of the measured pass that is left free besides.
_CUDA_RESERVE = 0.06
_STEP_MARGIN = 1.1


def affordable_tokens(layers: Seq[LayerLayout], step_bytes: int, num_sharing: int = 1) -> int:
    """Tokens for which the keys and values of all layers fit on the layers' devices.

    `step_bytes`: what the largest pass needs, of every device. `num_sharing`: processes of this
    replica that share the memory of the CPU.
    """
    per_token_bytes: dict[torch.device, int] = defaultdict(int)
    for layer in layers:
        per_token_bytes[layer.device] += layer.bytes_per_token
    return min(
        _budget_bytes(device, step_bytes, num_sharing) // num_bytes
        for device, num_bytes in per_token_bytes.items()
    )


def _budget_bytes(device: torch.device, step_bytes: int, num_sharing: int) -> int:
    """Bytes of the device's free memory to use for keys and values."""
    free = free_bytes(device) - int(step_bytes * _STEP_MARGIN)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return max(0, free - int(total * _CUDA_RESERVE))
    return max(0, min(int(free * _CPU_SHARE / num_sharing), _CPU_MAX_BYTES))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _available_ram()


def _available_ram() -> int:
    """Available RAM in bytes, within the container's limit if there is one."""
    available = 8 << 30  # used if /proc/meminfo has no MemAvailable
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
