"""Forks attended over their common prefix give the logits of sequences that share nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.engine import Append, Engine, EngineOptions, Sequence, load_engine
from tests.engine.reference import TOLERANCE
from tests.families import save_family
from tests.tiny_models import LOGIT_STD, make_tiny_model


class Twins:
    """Each sequence has a twin with the same tokens that never shared pages."""

    def __init__(self, engine: Engine, tolerance: float) -> None:
        self.engine = engine
        self.tolerance = tolerance
        self.rng = np.random.default_rng(0)
        self.tokens: dict[Sequence, list[int]] = {}
        self.twins: dict[Sequence, Sequence] = {}

    def open(self, count: int) -> Sequence:
        sequence = self.engine.store.open(300)
        self.tokens[sequence] = []
        self.twins[sequence] = self.engine.store.open(300)
        self.step([(sequence, count)])
        return sequence

    def fork(self, parent: Sequence, length: int) -> Sequence:
        store = self.engine.store
        child = store.fork(parent, 300, length=length)
        assert child.run_start is None, "its own pages follow the shared ones"
        self.tokens[child] = self.tokens[parent][:length]
        self.twins[child] = store.open(300)
        self.engine.forward([Append(self.twins[child], self.tokens[child], 0)])
        return child

    def truncate(self, sequence: Sequence, length: int) -> None:
        self.engine.store.truncate(sequence, length)
        self.engine.store.truncate(self.twins[sequence], length)
        del self.tokens[sequence][length:]

    def step(self, parts: list[tuple[Sequence, int]]) -> None:
        """Append random tokens to the sequences in one forward pass, to their twins one by one."""
        new = [self.rng.integers(256, size=count).tolist() for _, count in parts]
        appends = [Append(s, ids, len(ids)) for (s, _), ids in zip(parts, new, strict=True)]
        logits = self.engine.forward(appends)
        twins = [a._replace(sequence=self.twins[a.sequence]) for a in appends]
        expected = torch.cat([self.engine.forward([twin]) for twin in twins])
        assert float((logits - expected).abs().max()) <= self.tolerance * LOGIT_STD
        for append in appends:
            self.tokens[append.sequence] += append.token_ids  # type: ignore[arg-type]
        self.engine.store.check_integrity()


# Twice the tolerance: cached keys and values of both sides differ by it already.
def check_forks(engine: Engine, tolerance: float = 2 * TOLERANCE) -> None:
    """Decoding, verification, chunks, roll-back and forks of forks, compared with the twins."""
    twins = Twins(engine, tolerance)
    parent, other = twins.open(150), twins.open(90)
    forks = [twins.fork(parent, length) for length in (150, 150, 149, 144, 137, 64)]
    forks += [twins.fork(other, length) for length in (90, 65)]
    for _ in range(3):
        twins.step([(s, 1) for s in (forks[0], parent, *forks[1:], other)])
    # Different lengths in one step, one a prompt chunk; then roll-back and forks of forks.
    twins.step([(s, n) for s, n in zip(forks, (1, 4, 4, 1, 2, 2, 30, 4), strict=True)])
    twins.truncate(forks[1], 152)
    twins.truncate(forks[2], 70)
    forks += [twins.fork(forks[0], 153), twins.fork(forks[6], 80)]
    for _ in range(2):
        twins.step([(s, 1) for s in reversed(forks)])
    for sequence, twin in twins.twins.items():
        engine.store.free(sequence)
        engine.store.free(twin)
    assert engine.store.used_tokens == 0


# Windows that end in the tails, in the prefix, and before it.
@pytest.mark.parametrize(
    ("family", "window"),
    [("llama", None), ("gpt2", None), ("qwen3", None), ("gemma2", 13), ("gemma2", 100),
     ("gemma3", 40), ("mistral_window", 23), ("mistral_window", 64)],
)  # fmt: skip
def test_forks_equal_their_twins(family: str, window: int | None, tmp_path: Path) -> None:
    fields = {} if window is None else {"sliding_window": window}
    make_tiny_model(family, tmp_path, num_layers=3, **fields)
    check_forks(load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=8192)))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_with_sinks_or_unequal_dims(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    check_forks(load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=8192)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 40])
def test_forks_in_low_precision(dtype: str, window: int | None, tmp_path: Path) -> None:
    """Close to the same tokens without forks; the window hides the whole prefix from some."""
    family = "llama" if window is None else "mistral_window"
    make_tiny_model(family, tmp_path, **({} if window is None else {"sliding_window": window}))
    engine = load_engine(EngineOptions(str(tmp_path), dtype=dtype, kv_cache_tokens=4096))
    tokens = np.random.default_rng(1).integers(256, size=141)
    parent, plain = engine.store.open(150), engine.store.open(150)
    engine.forward([Append(parent, tokens[:90], 0), Append(plain, tokens[:90], 0)])
    forks = [engine.store.fork(parent, 150) for _ in range(4)]
    for start in range(90, 141, 3):
        ids = tokens[start : start + 3]
        expected = engine.forward([Append(plain, ids, 3)])
        logits = engine.forward([Append(fork, ids, 3) for fork in forks])
        difference = (logits - expected.repeat(4, 1)).abs()
        assert float(difference.mean()) < 0.05 * float(expected.std())
