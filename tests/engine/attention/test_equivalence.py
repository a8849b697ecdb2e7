"""Logits equal an uncached eager model after any appends, roll-backs, forks and frees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.engine import Append, Engine, EngineOptions, Sequence, load_engine
from outrider.engine.loading import prepack
from outrider.engine.loading.linear_kernels import (
    FbgemmFloat16,
    LinearKernel,
    OneDnnBfloat16,
    OneDnnFloat32,
    TorchLinear,
    TransposedLinear,
)
from tests.engine.cpu import cpu_has
from tests.engine.reference import Reference, Shadow
from tests.tiny_models import FAMILIES, rounded


class Driver:
    """Applies random operations to an engine's sequences and checks the logits of each step."""

    def __init__(self, engine: Engine, shadow: Shadow, seed: int) -> None:
        self.engine = engine
        self.shadow = shadow
        self.rng = np.random.default_rng(seed)
        self.tokens_of: dict[Sequence, list[int]] = {}

    def step(self, parts: list[tuple[Sequence, int, int]]) -> None:
        """Append (sequence, tokens, logits) in one forward pass and check every row."""
        new = [self.shadow.random_tokens(count) for _, count, _ in parts]
        appends = [Append(s, ids, n) for (s, _, n), ids in zip(parts, new, strict=True)]
        logits = self.engine.forward(appends)
        assert logits.dtype == torch.float32
        row = 0
        for append, ids in zip(appends, new, strict=True):
            tokens = self.tokens_of[append.sequence]
            tokens += ids
            rows = logits[row : row + append.num_logits]
            self.shadow.assert_rows(rows, tokens, f"{len(ids)} tokens at {len(tokens)}")
            row += append.num_logits
        assert row == len(logits)
        self.check()

    def open(self, max_len: int) -> Sequence:
        sequence = self.engine.store.open(max_len)
        self.tokens_of[sequence] = []
        return sequence

    def truncate(self, sequence: Sequence, length: int) -> None:
        self.engine.store.truncate(sequence, length)
        del self.tokens_of[sequence][length:]

    def fork(self, sequence: Sequence, max_len: int) -> Sequence:
        child = self.engine.store.fork(sequence, max_len)
        self.tokens_of[child] = list(self.tokens_of[sequence])
        return child

    def free(self, sequence: Sequence) -> None:
        self.engine.store.free(sequence)
        del self.tokens_of[sequence]

    def check(self) -> None:
        self.engine.store.check_integrity()
        for sequence, tokens in self.tokens_of.items():
            assert sequence.length == len(tokens)

    def random_change(self) -> None:
        """Truncate, fork, extend, free or open a random sequence."""
        sequences = list(self.tokens_of)
        choice = self.rng.integers(5)
        if choice == 4 or len(sequences) < 2:
            self.open(int(self.rng.integers(40, 90)))
        else:
            sequence = sequences[self.rng.integers(len(sequences))]
            if choice == 0:
                self.truncate(sequence, int(self.rng.integers(sequence.length + 1)))
            elif choice == 1 and len(sequences) < 6:
                self.fork(sequence, sequence.length + int(self.rng.integers(1, 40)))
            elif choice == 2:
                self.engine.store.extend(sequence, sequence.max_len + 17)
            else:
                self.free(sequence)
        self.check()

    def random_step(self) -> None:
        """Prefill chunks (with or without logits), decodes and verifications in one step."""
        parts = []
        for sequence in self.tokens_of:
            count = int(self.rng.choice([0, 1, 5, 7, 23]))
            count = min(count, sequence.max_len - sequence.length)
            if count > 0:
                parts.append((sequence, count, int(self.rng.choice([0, 1, count]))))
        self.step(parts)


@pytest.fixture
def driver(
    request: pytest.FixtureRequest,
    engine_of: Callable[[str], Engine],
    model_dir: Callable[[str], Path],
) -> Iterator[Driver]:
    family: str = request.param
    engine = engine_of(family)
    driver = Driver(engine, Shadow(Reference(model_dir(family)), seed=1), seed=2)
    yield driver
    for sequence in list(driver.tokens_of):
        driver.free(sequence)
    assert engine.store.used_tokens == 0


@pytest.mark.parametrize("driver", FAMILIES, indirect=True)
def test_one_ragged_step_of_every_kind(driver: Driver) -> None:
    """Prefill, decode, 5-token verification and a prefill chunk in one pass; then roll-back."""
    fresh, decoding, verifying, chunked = (driver.open(80) for _ in range(4))
    driver.step([(decoding, 19, 1), (verifying, 30, 1), (chunked, 21, 0)])
    driver.step([(fresh, 27, 27), (decoding, 1, 1), (verifying, 5, 5), (chunked, 22, 0)])
    driver.truncate(verifying, 32)
    driver.truncate(decoding, 3)
    driver.step([(verifying, 5, 5), (chunked, 9, 1), (decoding, 2, 2), (fresh, 1, 1)])


@pytest.mark.parametrize("driver", FAMILIES, indirect=True)
def test_random_operations(driver: Driver) -> None:
    for _ in range(25):
        driver.random_change()
        driver.random_step()


@pytest.mark.parametrize("driver", ["llama", "gemma2"], indirect=True)
def test_prefill_longer_than_a_block_of_queries(driver: Driver) -> None:
    """Attention is computed in blocks of 128 queries."""
    long, short = driver.open(400), driver.open(20)
    driver.step([(short, 3, 3), (long, 300, 300)])
    driver.step([(long, 5, 5), (short, 1, 1)])


@pytest.mark.parametrize("driver", ["llama", "gemma3", "gemma2"], indirect=True)
def test_scattered_pages_are_gathered(driver: Driver) -> None:
    """A fork's own pages are apart from the shared ones, so its history is not a view."""
    parent = driver.open(64)
    driver.step([(parent, 37, 1)])
    child = driver.fork(parent, 90)
    assert child.run_start is None
    driver.step([(child, 5, 5), (parent, 5, 5)])
    driver.step([(child, 1, 1), (parent, 1, 1)])
    driver.truncate(child, 18)
    driver.step([(child, 30, 3), (parent, 2, 2)])
    driver.free(parent)
    driver.step([(child, 2, 2)])
    assert child.run_start is not None, "not moved although it shares nothing"


def test_two_engines_in_one_process(
    engine_of: Callable[[str], Engine], model_dir: Callable[[str], Path]
) -> None:
    """Interleaved calls use the memory of their own engine."""
    engines = {family: engine_of(family) for family in ("llama", "gpt2")}
    drivers = [
        Driver(engine, Shadow(Reference(model_dir(family)), seed=3), seed=4)
        for family, engine in engines.items()
    ]
    sequences = [driver.open(40) for driver in drivers]
    for count in (9, 1, 5, 1):
        for driver, sequence in zip(drivers, sequences, strict=True):
            driver.step([(sequence, count, count)])
    for driver, sequence in zip(drivers, sequences, strict=True):
        driver.free(sequence)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float16), ("gpt2", torch.float16), ("qwen2", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize(
    "kernel",
    [FbgemmFloat16, OneDnnFloat32, TransposedLinear, TorchLinear],
    ids=lambda kernel: kernel.name,
)
def test_each_kernel_serves_16_bit_checkpoints_exactly(
    kernel: type[LinearKernel],
    family: str,
    dtype: torch.dtype,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As float32 arithmetic on the checkpoint's weights, within the tolerance of float32."""
    monkeypatch.setattr(prepack, "CANDIDATES", (kernel, TorchLinear))
    path = rounded(model_dir(family), tmp_path / "model", dtype)
    engine = load_engine(EngineOptions(str(path), kv_cache_tokens=256))
    assert engine.info.dtype == "float32"
    assert set(engine.info.linear_kernels) == {kernel.name if cpu_has(kernel) else "torch"}
    driver = Driver(engine, Shadow(Reference(path), seed=5), seed=6)
    driver.open(60)
    for _ in range(3):
        driver.random_change()
        driver.random_step()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_without_prepacked_linears(family: str, model_dir: Callable[[str], Path]) -> None:
    options = EngineOptions(str(model_dir(family)), kv_cache_tokens=256, prepack=False)
    engine = load_engine(options)
    assert set(engine.info.linear_kernels) == {"torch"}
    driver = Driver(engine, Shadow(Reference(model_dir(family)), seed=5), seed=6)
    driver.open(60)
    for _ in range(3):
        driver.random_step()


@pytest.mark.parametrize("forbidden", ["", "onednn_bfloat16"], ids=["best", "fallback"])
def test_bfloat16_is_close_to_float32(model_dir: Callable[[str], Path], forbidden: str) -> None:
    """With the prepacked kernel if the CPU has it, and with torch's kernel everywhere."""
    engine = load_engine(
        EngineOptions(
            str(model_dir("llama")),
            dtype="bfloat16",
            kv_cache_tokens=256,
            forbid_kernels=frozenset({forbidden} - {""}),
        )
    )
    assert engine.info.dtype == "bfloat16"
    has_kernel = cpu_has(OneDnnBfloat16) and not forbidden
    assert set(engine.info.linear_kernels) == {"onednn_bfloat16" if has_kernel else "torch"}
    tokens = Shadow(Reference(model_dir("llama")), seed=7).random_tokens(40)
    sequence = engine.store.open(40)
    logits = engine.forward([Append(sequence, tokens, 40)])
    expected = Reference(model_dir("llama")).logits(tokens)
    assert logits.dtype == torch.float32
    assert float((logits - expected).abs().mean()) < 0.05 * float(expected.std())
