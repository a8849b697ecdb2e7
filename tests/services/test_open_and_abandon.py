"""Generations opened and abandoned repeatedly: memory and KV stay constant, counters match.

Tests the workers of both tiers, with an engine without a model whose passes take no time.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from draft_service import messages
from draft_service.scheduler_worker import Proposer
from outrider.engine.simulated import SimulatedEngine
from outrider.model_server.messages import Close, Failure, Forget, ServiceStatistics
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.worker import GenerationWorker
from outrider.sampling.params import SamplingParams, Verification
from outrider.settings.simulation import Simulation
from target_service.messages import OpenTarget, Verify
from target_service.verifier import Verifier

VOCAB_SIZE = 1_000
KV_TOKENS = 4_096
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, seed=1)
SYSTEM = list(range(64))
# Memory blocks that Python may have more after NUM_CYCLES than before: none that grow with their
# number. (Blocks, not bytes: tracing bytes makes this three times as slow.)
MAX_GROWTH_BLOCKS = 500
NUM_CYCLES = 5_000
# Before them: the memory for prefixes is full after a hundred, tables have their size.
NUM_WARM_UP = 1_500
WAYS = ("before a pass", "in a prompt", "after a pass", "kept", "kept and forgotten", "taken over")

Worker = GenerationWorker[Any, Any, Any, Any]


def engine() -> SimulatedEngine:
    simulation = Simulation(step_ms=((1, 0.0),), vocab_size=VOCAB_SIZE, context_len=2_048)
    return SimulatedEngine(simulation, KV_TOKENS)


class Target:
    """A target worker and its commands."""

    def __init__(self) -> None:
        self.engine = engine()
        self.worker: Worker = Verifier(
            self.engine, max_gamma=4, max_step_tokens=64, idle_session_ttl_s=0.001
        )

    def opening(self, key: GenerationKey, session_id: str, epoch: int, ids: Any) -> list[Any]:
        opened = OpenTarget(key, session_id, epoch, 0, len(ids), len(ids) + 40, PARAMS)
        return [opened, Verify(key, 0, ids, np.array([5, 6]), None)]


class Draft:
    """A draft worker and its commands."""

    def __init__(self) -> None:
        self.engine = engine()
        self.worker: Worker = Proposer(
            self.engine,
            max_gamma=4,
            max_step_tokens=64,
            max_branches=16,
            idle_session_ttl_s=0.001,
        )

    def opening(self, key: GenerationKey, session_id: str, epoch: int, ids: Any) -> list[Any]:
        opened = messages.OpenDraft(
            key,
            session_id,
            epoch,
            ids,
            len(ids),
            len(ids) + 40,
            PARAMS,
            Verification.REJECTION,
            gamma=4,
            ahead_gamma=4,
            lookahead=2,
            fan_out=4,
            vocab_size=VOCAB_SIZE,
        )
        commit = messages.Commit(key, [5, 6], len(ids) + 2, 4, 4)
        return [opened, commit]


def cycle(tier: Target | Draft, number: int) -> Iterator[Sequence[Any]]:
    """Commands of one abandoned generation, step by step."""
    chance, way = np.random.default_rng(number), WAYS[number % len(WAYS)]
    own = chance.integers(VOCAB_SIZE, size=chance.integers(1, 120))
    context = np.concatenate((SYSTEM[: chance.integers(64)], own)).astype(np.int64)
    key, session_id = GenerationKey(1, number), f"session-{number}"
    commands = tier.opening(key, session_id, 1, context)
    close = Close(key, keep=way.startswith("kept"))
    if way == "before a pass":
        yield [*commands, close, close]
        return
    yield commands
    if way != "in a prompt":
        yield []
        yield []
    if way == "taken over":
        later = GenerationKey(2, number)
        yield tier.opening(later, session_id, 2, context)
        yield [Close(later, keep=False)]
    yield [close]
    if way == "kept and forgotten":
        yield [Forget(GenerationKey(1, 0), session_id)]
    yield [close]  # once more: nothing happens


def abandon(tier: Target | Draft, numbers: range) -> None:
    for number in numbers:
        for commands in cycle(tier, number):
            for outcome in tier.worker.step(commands, lambda: True):
                if isinstance(outcome, Failure):
                    assert "taken over" in outcome.detail, outcome
        if number % 100 == 0:
            tier.worker.tidy()


def held_blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Target, Draft])
def test_abandoned_generations_leave_nothing(kind: type[Target | Draft]) -> None:
    tier = kind()
    abandon(tier, range(1, NUM_WARM_UP))
    before = held_blocks()
    abandon(tier, range(NUM_WARM_UP, NUM_WARM_UP + NUM_CYCLES))
    growth = held_blocks() - before
    time.sleep(0.01)  # what is kept lapses
    tier.worker.tidy()
    load: ServiceStatistics = tier.worker.statistics()
    assert (load.num_open_generations, load.kv_used_tokens) == (0, 0)
    assert load.num_opened_total == load.num_closed_total >= NUM_CYCLES
    assert load.num_prefix_hit_tokens_total > 0
    store = tier.engine.store
    store.check_integrity()
    assert store.num_sequences == 0
    assert store.idle_tokens <= store.capacity_tokens
    assert growth < MAX_GROWTH_BLOCKS
