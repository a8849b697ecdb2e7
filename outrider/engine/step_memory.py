"""Memory of one forward pass and its sampling: how much it needs, and what happens without it."""

from __future__ import annotations

import ctypes
import math
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from outrider.engine.interface import Append, ScoreRequest
from outrider.engine.kv.budget import free_bytes
from outrider.engine.kv.sequence import pages_for
from outrider.engine.parallel.group import RankGroup
from outrider.engine.sampling.batching import is_allocation_failure
from outrider.errors import StepOutOfMemory
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from outrider.engine.engine import Engine

# Logits of one pass, in float32, as a share of the memory that is free before the model's KV; the
# sampler needs several times as much for a moment.
_LOGITS_SHARE = 1 / 64
MAX_ROWS = 8192
"""Rows of logits of one pass, whatever the memory: 1,024 generations with blocks of 8 tokens."""
# A CPU measures as large a pass as this many seconds allow, and scales it.
_CPU_BUDGET_S = 0.5
_TIMED_LEN = 16


def max_step_rows(vocab_size: int, device: torch.device) -> int:
    """Most rows of logits in one pass."""
    rows = int(free_bytes(device) * _LOGITS_SHARE) // (4 * vocab_size)
    return max(1, min(rows, MAX_ROWS))


def out_of_memory(error: Exception, num_tokens: int, num_rows: int) -> StepOutOfMemory | None:
    """StepOutOfMemory if the error is one of an allocator; then the pass's tensors are freed."""
    if not is_allocation_failure(error):
        return None
    text = str(error)
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    why = next(iter(text.strip().splitlines()), type(error).__name__)
    return StepOutOfMemory(num_tokens, num_rows, why)


def num_pages(num_tokens: int, context_len: int) -> int:
    """KV pages for `step_bytes`: sequences of at most the model's context, and a page each."""
    return math.ceil(num_tokens / context_len) * (pages_for(min(num_tokens, context_len)) + 1)


def step_bytes(engine: Engine, num_tokens: int, num_rows: int, group: RankGroup) -> int:
    """Measured peak of a pass over `num_tokens` tokens with `num_rows` rows sampled, in bytes.

    Beyond what is allocated before and after it. `engine` has an empty KV store with room for the
    tokens. On CPU it may be a smaller pass, scaled; 0 where the peak cannot be measured. The ranks
    of `group` run the same pass.
    """
    device = engine.store.keys[0].device
    _run(engine, min(_TIMED_LEN, num_tokens), 1)  # allocates what stays
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(engine, num_tokens, num_rows)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        return max(0, peak - before)
    started_at = time.perf_counter()
    _run(engine, min(_TIMED_LEN, num_tokens), 1)
    token_s = (time.perf_counter() - started_at) / min(_TIMED_LEN, num_tokens)
    measured = group.lowest(math.ceil(min(num_tokens, _CPU_BUDGET_S / token_s)))
    size = _reset_peak()
    _run(engine, measured, math.ceil(num_rows * measured / num_tokens))
    if size is None:
        return 0
    return max(0, _status("VmHWM") - size) * num_tokens // measured


def _run(engine: Engine, num_tokens: int, num_rows: int) -> None:
    """One pass with rows sampled as requests with top_p are; leaves the store empty."""
    store, info = engine.store, engine.info
    ids = np.random.default_rng(0).integers(0, min(info.vocab_size, 1000), num_tokens)
    appends: list[Append] = []
    rows_left = num_rows
    for start in range(0, num_tokens, info.max_context_len):
        part = ids[start : start + info.max_context_len]
        num_logits = min(rows_left, len(part))
        rows_left -= num_logits
        appends.append(Append(store.open(len(part)), part, num_logits))
    try:
        logits = engine.forward(appends)
        sampler = engine.sampler(SamplingParams(temperature=1.0, top_p=0.9), 1, info.vocab_size)
        request = ScoreRequest(sampler, ids, 1, 1, None)
        engine.score([request] * (num_rows - rows_left), logits)
    finally:
        for append in appends:
            store.free(append.sequence)


def _reset_peak() -> int | None:
    """Resets the peak of this process's memory, and returns its size; None: not possible here."""
    # glibc's: without it, memory that was freed would hide what the pass needs.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    """A size of this process in bytes, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
