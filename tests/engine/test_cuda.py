"""CUDA path on a GPU: FlashInfer against torch's attention, CUDA graphs against plain steps.

Skipped without a GPU; what can be tested without one is in test_flashinfer_contract.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider.engine import Append, Engine, EngineOptions, Sequence, load_engine
from outrider.engine.attention.cuda_graphs import BUCKETS, GraphedSteps
from outrider.engine.attention.flashinfer_backend import FlashInferBackend
from outrider.errors import ConfigError
from tests.engine.attention.test_shared_prefix import check_forks
from tests.tiny_models import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # FlashInfer compiles its kernels at first use.
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # warnings of its imports
]

needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="needs flashinfer-python"
)

# Head dimensions that FlashInfer supports. Windows end in the history, within a verification, or
# never.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
    "mistral_window": {"head_dim": 64, "sliding_window": 21},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 13},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 40},
}

Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    made: dict[str, Path] = {}

    def load(family: str, **options: Any) -> Engine:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / family
            made[family] = make_tiny_model(family, path, num_layers=3, **MODELS[family])
        given = {"device": "cuda", "kv_cache_tokens": 8192, "cuda_graphs": False, **options}
        return load_engine(EngineOptions(str(made[family]), **given))

    return load


class Pair:
    """Runs the same steps on two engines of one model and compares their logits."""

    def __init__(self, one: Engine, other: Engine) -> None:
        self.engines = (one, other)
        self.rng = np.random.default_rng(0)
        self.pairs: list[tuple[Sequence, Sequence]] = []

    def open(self, max_len: int) -> int:
        self.pairs.append(
            (self.engines[0].store.open(max_len), self.engines[1].store.open(max_len))
        )
        return len(self.pairs) - 1

    def fork(self, index: int, max_len: int, length: int) -> int:
        one, other = (
            engine.store.fork(sequence, max_len, length=length)
            for engine, sequence in zip(self.engines, self.pairs[index], strict=True)
        )
        self.pairs.append((one, other))
        return len(self.pairs) - 1

    def truncate(self, index: int, length: int) -> None:
        for engine, sequence in zip(self.engines, self.pairs[index], strict=True):
            engine.store.truncate(sequence, length)

    def step(self, parts: list[tuple[int, int]]) -> None:
        """Append `count` random tokens to each (index, count) and compare every row."""
        new = [self.rng.integers(256, size=count) for _, count in parts]
        one, other = (
            engine.forward(
                [
                    Append(self.pairs[index][side], ids, len(ids))
                    for (index, _), ids in zip(parts, new, strict=True)
                ]
            )
            for side, engine in enumerate(self.engines)
        )
        difference = (one - other).abs()
        scale = float(one.std())
        # Summation order explains this much in low precision; a wrong mask is off by about `scale`.
        assert float(difference.mean()) < 0.03 * scale
        assert float(difference.max()) < 0.5 * scale


def mixed_steps(pair: Pair) -> None:
    """Prefill, chunks, decoding, verification, forks, forks of forks and roll-back."""
    long, short = pair.open(400), pair.open(90)
    pair.step([(long, 200), (short, 3)])
    pair.step([(long, 1), (short, 40)])
    forks = [pair.fork(long, 260, length) for length in (201, 200, 192, 150)]
    for _ in range(3):
        pair.step([(index, 1) for index in (*forks, long, short)])
    pair.step([(forks[0], 5), (long, 6), (forks[1], 1), (short, 17)])
    pair.truncate(long, 203)
    pair.truncate(forks[0], 17)
    forks.append(pair.fork(forks[1], 260, 203))
    pair.step([(index, 1) for index in (long, *forks)])
    pair.step([(forks[0], 33), (forks[-1], 2), (long, 5)])


@needs_flashinfer
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", MODELS)
def test_flashinfer_gives_the_logits_of_torch(load: Load, family: str, dtype: str) -> None:
    flash = load(family, dtype=dtype, attention_backend="flashinfer")
    assert flash.info.attention_backend == "flashinfer"
    plain = load(family, dtype=dtype, attention_backend="torch")
    assert plain.info.attention_backend == "sdpa"
    mixed_steps(Pair(plain, flash))


@needs_flashinfer
@pytest.mark.parametrize("family", MODELS)
def test_graphs_give_the_logits_of_plain_steps(load: Load, family: str) -> None:
    """Every bucket, full and padded, replayed between steps of other shapes."""
    plain = load(family, dtype="bfloat16", attention_backend="flashinfer")
    twin = load(family, dtype="bfloat16", attention_backend="flashinfer")
    backend = twin._backend
    assert isinstance(backend, FlashInferBackend)
    graphs = GraphedSteps(twin._model, backend)
    pair = Pair(plain, Engine(twin._model, twin.store, twin.info, backend, graphs))
    mixed_steps(pair)
    parent = pair.open(120)
    pair.step([(parent, 77)])
    forks = [pair.fork(parent, 96, 70 + i % 8) for i in range(BUCKETS[-1])]
    for count in (1, 3, 8, 11, 32, 33, 64, 2):
        pair.step([(index, 1) for index in forks[:count]])
    assert not graphs.failed


@needs_flashinfer
def test_backend_chosen_at_load(load: Load) -> None:
    """FlashInfer in low precision, torch in float32; graphs as measured."""
    engine = load("llama", dtype="bfloat16", cuda_graphs=True)
    assert engine.info.attention_backend == "flashinfer"
    assert isinstance(engine.info.cuda_graphs, bool)
    assert load("llama", dtype="float32").info.attention_backend == "sdpa"
    with pytest.raises(ConfigError, match="float32"):
        load("llama", dtype="float32", attention_backend="flashinfer")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forks_with_torch_attention(load: Load, family: str) -> None:
    """Grouped attention as on a CPU; on a GPU the parts are computed explicitly."""
    check_forks(load(family, dtype="float32", attention_backend="torch"), tolerance=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_with_torch_attention(load: Load, dtype: str) -> None:
    """Low precision against float32: validates the reference of the other tests."""
    low = load("llama", dtype=dtype, attention_backend="torch")
    mixed_steps(Pair(load("llama", dtype="float32", attention_backend="torch"), low))
