"""Calls to FlashInfer, checked on the CPU against a plain implementation of its contract.

`PlainWrapper` implements what FlashInfer's documentation says of the calls that the engine makes,
so tables, plans, padding and fixed buffers are tested without a GPU. Whether FlashInfer itself
keeps the contract is tested in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.engine import Engine, EngineOptions, load_engine
from outrider.engine.attention import select
from outrider.engine.attention.cuda_graphs import GraphedSteps, Run
from outrider.engine.attention.flashinfer_backend import FlashInferBackend
from outrider.errors import ConfigError
from tests.engine.attention.test_equivalence import Driver
from tests.engine.reference import Reference, Shadow


class PlainWrapper:
    """BatchPrefillWithPagedKVCacheWrapper as documented: NHD, causal, one sequence at a time."""

    def __init__(
        self,
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self._buffers = (
            qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
        )  # fmt: skip
        self._use_cuda_graph = use_cuda_graph
        self._tables: tuple[torch.Tensor, ...] = ()
        self.num_plans = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float | None,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in given)
        if self._use_cuda_graph:
            for index, (buffer, table) in enumerate(zip(self._buffers, given, strict=True)):
                assert buffer is not None
                assert len(table) == len(buffer) or (index == 2 and len(table) < len(buffer))
                buffer[: len(table)].copy_(table)
            self._tables = tuple(buffer for buffer in self._buffers if buffer is not None)
        else:
            self._tables = given
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._dtypes = (q_data_type, kv_data_type)
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self._window_left = window_left
        self._cap = logits_soft_cap or 0.0
        self.num_plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """q [T, heads, dim], K and V [pages, page, kv_heads, dim] → [T, heads, dim]."""
        starts, page_starts, page_ids, last = (table.tolist() for table in self._tables)
        heads, kv_heads, dim, page_size = self._shape
        assert q.shape == (starts[-1], heads, dim)
        assert paged_kv_cache[0].shape[1:] == (page_size, kv_heads, dim)
        assert (q.dtype, paged_kv_cache[0].dtype) == self._dtypes
        outs = []
        for i in range(len(starts) - 1):
            ids = torch.tensor(page_ids[page_starts[i] : page_starts[i + 1]])
            total = (len(ids) - 1) * page_size + last[i]
            key, value = (
                cache[ids].flatten(0, 1)[:total].repeat_interleave(heads // kv_heads, dim=1)
                for cache in paged_kv_cache
            )
            outs.append(self._attend(q[starts[i] : starts[i + 1]], key, value))
        return torch.cat(outs)

    def _attend(self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", q.float(), key.float()) * self._scale
        if self._cap > 0:
            scores = self._cap * torch.tanh(scores / self._cap)
        column = torch.arange(len(key))
        row = torch.arange(len(key) - len(q), len(key))[:, None]
        hidden = column > row
        if self._window_left >= 0:
            hidden |= column < row - self._window_left
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value.float()).to(q.dtype)


def paged_engine(plain: Engine, *, graphs: bool) -> Engine:
    """The same model and store with a FlashInfer backend on top of PlainWrapper.

    A captured step is run again instead of replayed: it reads and writes the same memory.
    """
    backend = FlashInferBackend(plain.store, plain._model.windows, PlainWrapper)

    def run_again(run: Run, device: torch.device) -> Run:
        run()
        return run

    graphed = GraphedSteps(plain._model, backend, run_again) if graphs else None
    return Engine(plain._model, plain.store, plain.info, backend, graphed)


# Windows, soft-caps with a scaling, grouped heads, and none of these.
FAMILIES = ["llama", "mistral_window", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_operations(
    family: str, engine_of: Callable[[str], Engine], model_dir: Callable[[str], Path]
) -> None:
    engine = paged_engine(engine_of(family), graphs=False)
    driver = Driver(engine, Shadow(Reference(model_dir(family)), seed=1), seed=2)
    for _ in range(12):
        driver.random_change()
        driver.random_step()
    for sequence in list(driver.tokens_of):
        driver.free(sequence)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_tokens_in_padded_batches(
    family: str, engine_of: Callable[[str], Engine], model_dir: Callable[[str], Path]
) -> None:
    """One to six sequences, some of them forks, with verifications and roll-back in between."""
    engine = paged_engine(engine_of(family), graphs=True)
    driver = Driver(engine, Shadow(Reference(model_dir(family)), seed=1), seed=2)
    parent, other = driver.open(80), driver.open(40)
    driver.step([(parent, 37, 1), (other, 15, 1)])
    forks = [driver.fork(parent, 60) for _ in range(4)]
    for _ in range(3):
        driver.step([(s, 1, 1) for s in (*forks, other, parent)])
        driver.step([(s, 1, 1) for s in forks[:3]])
        driver.step([(parent, 1, 0), (forks[3], 1, 1)])
        driver.step([(parent, 4, 4), (other, 1, 1)])
        driver.truncate(parent, parent.length - 2)
        driver.step([(parent, 1, 1)])
    driver.free(forks.pop())
    driver.step([(s, 1, 0) for s in forks])
    assert engine._graphs is not None
    assert sorted(engine._graphs._steps) == [1, 2, 4, 8]
    for sequence in list(driver.tokens_of):
        driver.free(sequence)


@pytest.mark.parametrize(
    ("backend", "why"),
    [("flashinfer", "not on a CUDA device"), ("fast", "expected auto, torch, flashinfer")],
)
def test_an_unavailable_backend_is_refused(
    backend: str, why: str, model_dir: Callable[[str], Path]
) -> None:
    options = EngineOptions(str(model_dir("llama")), device="cpu", attention_backend=backend)
    with pytest.raises(ConfigError, match=why):
        load_engine(options)


def test_a_failing_flashinfer_is_replaced_by_torch(
    model_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is refused only if requested by name. (On a CPU it always fails.)"""
    monkeypatch.setattr(select, "_flashinfer_obstacle", lambda *_: None)
    directory = str(model_dir("llama"))
    engine = load_engine(EngineOptions(directory, device="cpu", kv_cache_tokens=64))
    assert engine.info.attention_backend.startswith("sdpa")
    assert "FlashInfer fails here" in caplog.text
    options = EngineOptions(directory, device="cpu", attention_backend="flashinfer")
    with pytest.raises(ConfigError, match="fails here"):
        load_engine(options)


def test_no_capture_is_tried_after_a_failed_one(
    engine_of: Callable[[str], Engine], caplog: pytest.LogCaptureFixture
) -> None:
    plain = engine_of("llama")
    backend = FlashInferBackend(plain.store, plain._model.windows, PlainWrapper)
    attempts = []

    def fail(run: Run, device: torch.device) -> Run:
        attempts.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = GraphedSteps(plain._model, backend, fail)
    engine: Any = Engine(plain._model, plain.store, plain.info, backend, graphs)
    driver = Driver(engine, Shadow(Reference(Path(plain.info.name)), seed=1), seed=2)
    sequence = driver.open(30)
    driver.step([(sequence, 9, 1)])
    driver.step([(sequence, 1, 1)])
    driver.step([(sequence, 1, 1)])
    assert (graphs.failed, len(attempts)) == (True, 1)
    assert "no CUDA graph of 1 sequences" in caplog.text
    driver.free(sequence)
