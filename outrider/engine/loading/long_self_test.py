"""Long self-test before a model serves: one sequence beyond the sliding window and over many pages.

Finds errors that depend on length: windows, page tables, query blocks of a long prompt. Like the
short self-test (`self_test.py`) it compares with transformers' eager attention, on the last rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from outrider.engine.engine import Engine
from outrider.engine.interface import Append
from outrider.engine.kv.budget import free_bytes
from outrider.engine.kv.store import PAGE_SIZE, Sequence
from outrider.engine.loading import self_test, supported
from outrider.engine.loading.loaded_model import BoundModel
from outrider.engine.parallel.group import RankGroup

_log = logging.getLogger(__name__)

# Length of the sequence unless a window needs more: twenty pages, three query blocks.
_MIN_LEN = 320
# Rows compared: the last tokens, more than a page, so that a page boundary is among them.
_NUM_ROWS = 24
_BUDGET_S = 10.0
# Tokens of the timed pass. The short self-test has warmed up the kernels.
_TIMED_LEN = 48
# Eager attention, and the engine.
_NUM_PASSES = 2
# Share of free memory for the scores of eager attention, and bytes per score: raw, masked and
# softmaxed.
_MEMORY_SHARE = 0.25
_SCORE_BYTES = 12


@dataclass(frozen=True)
class LongSelfTest:
    """Tokens, and their expected last rows: eager logits, float32 [_NUM_ROWS, vocab]."""

    token_ids: self_test.Tokens
    expected: torch.Tensor

    @property
    def num_pages(self) -> int:
        """Pages of the KV store that `difference` needs."""
        return 2 * math.ceil(len(self.token_ids) / PAGE_SIZE) + 2

    def difference(self, name: str, engine: Engine) -> float:
        """Largest difference of a logit. Raises ModelError if rounding cannot explain it."""
        return self_test.check_difference(name, self.largest(engine), self.expected, engine)

    def largest(self, engine: Engine) -> float:
        """Largest difference of a logit."""
        return max(
            self_test.difference(expected, actual)
            for expected, actual in _steps(engine, self.token_ids, self)
        )

    @classmethod
    def of_length(cls, module: Any, length: int) -> LongSelfTest:
        """Random tokens with their eager logits."""
        token_ids = self_test.random_tokens(module, length, seed=1)
        (expected,) = self_test.eager_logits(module, (token_ids,), num_rows=_NUM_ROWS)
        return cls(token_ids, expected)


def prepare_long_self_test(name: str, model: BoundModel, group: RankGroup) -> LongSelfTest | None:
    """Reference logits, computed before the weights are prepacked; None for a very short context.

    If time or memory is short, the sequence is shorter. A warning names the window it does not
    cross.
    """
    if model.max_context_len <= _TIMED_LEN:
        return None
    window = supported.longest_window(model.module.config)
    wanted = min(model.max_context_len, max(_MIN_LEN, window + PAGE_SIZE + 1))
    length = group.lowest(min(wanted, affordable_len(model.module)))
    if wanted > window >= length:
        _log.warning(
            "%s: the self-test has only %d tokens, limited by time or memory; "
            "the sliding window of %d tokens is not checked",
            name, length, window,
        )  # fmt: skip
    if length <= _TIMED_LEN:
        return None
    return LongSelfTest.of_length(model.module, length)


def affordable_len(module: Any) -> int:
    """Longest sequence that fits the time and memory limits, from one timed pass."""
    started_at = time.perf_counter()
    (logits,) = self_test.eager_logits(
        module, (self_test.random_tokens(module, _TIMED_LEN, seed=3),)
    )
    float(logits[-1, -1])  # waits for the device
    token_s = (time.perf_counter() - started_at) / _TIMED_LEN
    by_time = _BUDGET_S / (_NUM_PASSES * max(token_s, 1e-9))
    num_heads = module.config.get_text_config().num_attention_heads
    num_bytes = _MEMORY_SHARE * free_bytes(module.device)
    return int(min(by_time, math.sqrt(num_bytes / (num_heads * _SCORE_BYTES))))


def _steps(
    engine: Engine, token_ids: self_test.Tokens, long: LongSelfTest
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(expected, actual) logits of the last rows: chunked prefill, roll-back, shared pages."""
    store, length = engine.store, len(token_ids)
    base = length - _NUM_ROWS

    def rows(sequence: Sequence, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the tokens up to `stop`; logits of those among the last rows."""
        start = sequence.length
        num_rows = max(0, stop - max(start, base))
        actual = engine.forward([Append(sequence, token_ids[start:stop], num_rows)])
        return long.expected[stop - base - num_rows : stop - base], actual

    sequence = store.open(length)
    for stop in (base // 3, 2 * base // 3, base):
        rows(sequence, stop)
    yield rows(sequence, base + 8)
    store.truncate(sequence, base + 5)  # rejected draft tokens
    yield rows(sequence, base + 12)
    yield rows(sequence, length)
    # A second sequence with the cached pages of the first, followed by pages elsewhere.
    store.cache_prefix(sequence, token_ids[:base])
    other = store.open(length)
    store.reuse_prefix(other, token_ids[:base])
    yield rows(other, length - 1)
    yield rows(other, length)
    store.free(other)
    store.free(sequence)
