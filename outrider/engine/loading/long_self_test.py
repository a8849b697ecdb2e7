"""The second check before a model serves: a sequence beyond the sliding window and many pages.

What depends on the length shows only here: windows, page tables, blocks of a long prompt. As the
first check (`probe`), against transformers' own eager attention; the last rows are compared.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from outrider.engine.engine import Append, Engine
from outrider.engine.kv import budget as memory
from outrider.engine.kv.store import PAGE_SIZE, Sequence
from outrider.engine.loading import self_test as probe
from outrider.engine.loading import supported as guards
from outrider.engine.loading.loaded_model import BoundModel

_log = logging.getLogger(__name__)

# Where no window asks for more. Twenty pages, and three blocks of queries.
_LEAST_LEN = 320
# The last tokens of the sequence: more than a page, so that a page boundary is among them.
_NUM_ROWS = 24
_BUDGET_S = 10.0
# The pass that tells what others will take. The short check has had its first, slow one.
_TIMED_LEN = 48
# Eager attention and the engine's own.
_NUM_PASSES = 2
# Of the memory that is free, for the scores of eager attention: as they are, masked, softmaxed.
_MEMORY_SHARE = 0.25
_SCORE_BYTES = 12


@dataclass(frozen=True)
class LongSelfTest:
    """Tokens, and float32 [_NUM_ROWS, vocab]: what eager attention says to the last of them."""

    token_ids: probe.Tokens
    expected: torch.Tensor

    @property
    def num_pages(self) -> int:
        """Of the store that `difference` needs."""
        return 2 * math.ceil(len(self.token_ids) / PAGE_SIZE) + 2

    def difference(self, name: str, engine: Engine) -> float:
        """The largest difference of a logit. Raises ModelError if it is absurd."""
        differences = [
            probe.difference(wanted, got) for wanted, got in _steps(engine, self.token_ids, self)
        ]
        return probe.checked(name, max(differences), self.expected, engine)


def long_probe(name: str, model: BoundModel) -> LongSelfTest | None:
    """What to compare, made before the weights are changed; None for a very short context.

    Where time or memory are short, so is the sequence, and the log says which window it does not
    cross.
    """
    if model.max_context_len <= _TIMED_LEN:
        return None
    window = guards.longest_window(model.module.config)
    wanted = min(model.max_context_len, max(_LEAST_LEN, window + PAGE_SIZE + 1))
    length = min(wanted, _affordable_len(model.module))
    if wanted > window >= length:
        _log.warning(
            "%s: the probe has %d tokens, as more would take too long or too much memory: its "
            "sliding window of %d tokens is not checked",
            name, length, window,
        )  # fmt: skip
    if length <= _TIMED_LEN:
        return None
    token_ids = probe.random_tokens(model.module, length, seed=1)
    (expected,) = probe.eager_logits(model.module, (token_ids,), num_rows=_NUM_ROWS)
    return LongSelfTest(token_ids, expected)


def _affordable_len(module: Any) -> int:
    started_at = time.perf_counter()
    (logits,) = probe.eager_logits(module, (probe.random_tokens(module, _TIMED_LEN, seed=3),))
    float(logits[-1, -1])  # on CUDA only now it is there
    token_s = (time.perf_counter() - started_at) / _TIMED_LEN
    by_time = _BUDGET_S / (_NUM_PASSES * max(token_s, 1e-9))
    num_heads = module.config.get_text_config().num_attention_heads
    num_bytes = _MEMORY_SHARE * memory.free_bytes(module.device)
    return int(min(by_time, math.sqrt(num_bytes / (num_heads * _SCORE_BYTES))))


def _steps(
    engine: Engine, token_ids: probe.Tokens, long: LongSelfTest
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(expected, actual) logits of the last rows, in several ways."""
    store, length = engine.store, len(token_ids)
    base = length - _NUM_ROWS

    def rows(sequence: Sequence, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens up to `stop`; logits of those that are among the last ones."""
        start = sequence.length
        num_rows = max(0, stop - max(start, base))
        got = engine.forward([Append(sequence, token_ids[start:stop], num_rows)])
        return long.expected[stop - base - num_rows : stop - base], got

    sequence = store.open(length)
    for stop in (base // 3, 2 * base // 3, base):
        rows(sequence, stop)
    yield rows(sequence, base + 8)
    store.truncate(sequence, base + 5)  # rejected draft tokens
    yield rows(sequence, base + 12)
    yield rows(sequence, length)
    # The pages of the other's beginning, and some of its own, which do not lie beside them.
    store.cache_prefix(sequence, token_ids[:base])
    other = store.open(length)
    store.reuse_prefix(other, token_ids[:base])
    yield rows(other, length - 1)
    yield rows(other, length)
    store.free(other)
    store.free(sequence)
