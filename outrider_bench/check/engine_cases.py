"""Full self-test on request: the engine as it serves, against plain eager attention.

More than the test at each load: several lengths, every sliding window crossed, single-token steps
of a batch (from CUDA graphs where they are used). The weights are loaded twice, one after the
other: as stored for the reference, then as served.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from outrider.engine.attention.interface import ATTENTION_NAME
from outrider.engine.engine import Engine
from outrider.engine.interface import Append
from outrider.engine.kv.store import PAGE_SIZE
from outrider.engine.loading import checkpoint, load, placement, rope, self_test, supported
from outrider.engine.loading.long_self_test import LongSelfTest, affordable_len
from outrider.engine.options import EngineOptions

# Lengths: within one query block, over many pages, long.
_LENGTHS = (48, 320, 2048)
# Single-token steps: sequences per step, tokens before them, steps.
_BATCHES = (1, 3, 8)
_CONTEXT_LEN, _NUM_STEPS = 40, 6


@dataclass(frozen=True)
class SelfTestCase:
    """One comparison. `difference`: largest of a logit; `allowed`: what rounding explains."""

    name: str
    difference: float
    allowed: float

    @property
    def is_passed(self) -> bool:
        return self.difference <= self.allowed


@dataclass(frozen=True)
class _Steps:
    """Sequences for single-token steps, and their eager logits [tokens, vocab]."""

    token_ids: list[self_test.Tokens]
    expected: list[torch.Tensor]


def full_self_test(options: EngineOptions) -> Iterator[SelfTestCase]:
    """Yields the cases. Raises ModelError or ConfigError if the model cannot be loaded.

    A load includes the usual self-test, which raises ModelError if it fails.
    """
    longs, steps = _references(options)
    gc.collect()  # the reference's weights, before the served ones are loaded
    tokens = sum(map(len, steps.token_ids)) + 2 * max(len(one.token_ids) for one in longs)
    pages = tokens // PAGE_SIZE + 4 * len(steps.token_ids)
    engine = load.load_engine(replace(options, kv_cache_tokens=pages * PAGE_SIZE))
    at_load = self_test.allowed_difference(longs[0].expected, engine)
    yield SelfTestCase("at load", engine.info.self_test_max_difference, at_load)
    for long in longs:
        allowed = self_test.allowed_difference(long.expected, engine)
        name = f"{len(long.token_ids)} tokens: chunks, roll-back, shared pages"
        yield SelfTestCase(name, long.largest(engine), allowed)
    allowed = self_test.allowed_difference(torch.cat(steps.expected), engine)
    graphs = ", CUDA graphs" if engine.info.cuda_graphs else ""
    for num in _BATCHES:
        name = f"single-token steps, batch of {num}{graphs}"
        yield SelfTestCase(name, _largest(engine, steps, num), allowed)


def _references(options: EngineOptions) -> tuple[list[LongSelfTest], _Steps]:
    """Eager logits of all cases, from the weights as stored."""
    device = placement.served_device(options.device)
    config = checkpoint.load_config(options.model)
    supported.check_config(options.model, config)
    module = checkpoint.load_weights(
        options.model,
        config,
        dtype=placement.served_dtype(options.dtype, device.type),
        attention=ATTENTION_NAME,
        device_map=None,
    ).to(device)
    context_len = supported.context_len(options.model, config, options.max_model_len)
    rope.fix_frequencies(options.model, module, options.max_model_len)
    longs = [LongSelfTest.of_length(module, n) for n in _lengths(module, config, context_len)]
    length = min(_CONTEXT_LEN + _NUM_STEPS, context_len)
    token_ids = [
        self_test.random_tokens(module, length - place, seed=10 + place)
        for place in range(max(_BATCHES))
    ]
    return longs, _Steps(token_ids, self_test.eager_logits(module, token_ids))


def _lengths(module: Any, config: Any, context_len: int) -> list[int]:
    """Lengths to test, within the context and what eager attention can afford."""
    wanted = set(_LENGTHS)
    if window := supported.longest_window(config):
        wanted.add(window + PAGE_SIZE + 1)
    longest = min(context_len, affordable_len(module))
    return sorted({max(min(_LENGTHS), min(length, longest)) for length in wanted})


def _largest(engine: Engine, steps: _Steps, num: int) -> float:
    """Largest difference over single-token steps of the first `num` sequences."""
    tokens, expected = steps.token_ids[:num], steps.expected[:num]
    sequences = [engine.store.open(len(ids)) for ids in tokens]
    starts = [len(ids) - _NUM_STEPS for ids in tokens]
    parts = zip(sequences, tokens, starts, strict=True)
    engine.forward([Append(sequence, ids[:start], 0) for sequence, ids, start in parts])
    largest = 0.0
    for step in range(_NUM_STEPS):
        parts = zip(sequences, tokens, starts, strict=True)
        actual = engine.forward([Append(s, ids[n + step : n + step + 1], 1) for s, ids, n in parts])
        rows = torch.stack([e[n + step] for e, n in zip(expected, starts, strict=True)])
        largest = max(largest, self_test.difference(rows, actual))
    for sequence in sequences:
        engine.store.free(sequence)
    return largest
