"""Memory of a pass: measured for the KV budget. One that does not fit is named and repeatable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from outrider.engine import Append, Engine, EngineOptions, load_engine, step_memory
from outrider.engine.interface import BlockScores, ScoreRequest
from outrider.engine.kv import budget
from outrider.engine.kv.tensors import LayerLayout
from outrider.engine.parallel.group import RankGroup
from outrider.errors import StepOutOfMemory
from outrider.sampling.params import SamplingParams
from tests.engine.reference import Reference, Shadow

CPU_FAILURE = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS: dict[str, Exception] = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nGPU 0 has"),
    "cpu": RuntimeError(CPU_FAILURE),
    "python": MemoryError("no memory"),
}


@contextmanager
def failing_above(num_tokens: int, error: Exception) -> Iterator[None]:
    """Every model's layers raise the error in passes of more tokens."""

    def check(module: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, torch.Tensor) and first.dim() == 3 and first.shape[1] > num_tokens:
            raise error

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ERRORS)
def test_a_pass_without_memory_is_named_and_can_be_repeated(
    kind: str, engine_of: Callable[[str], Engine], model_dir: Callable[[str], Path]
) -> None:
    engine = engine_of("llama")
    shadow = Shadow(Reference(model_dir("llama")), seed=0)
    ids, sequence = shadow.random_tokens(30), engine.store.open(30)
    with failing_above(20, ERRORS[kind]):
        with pytest.raises(StepOutOfMemory) as raised:
            engine.forward([Append(sequence, ids, 5)])
        assert (raised.value.num_tokens, raised.value.num_rows) == (30, 5)
        first_line = str(ERRORS[kind]).partition("\n")[0]
        expected = f"out of memory in a pass over 30 tokens with 5 rows of logits: {first_line}"
        assert str(raised.value) == expected
        assert raised.value.__context__ is None, "its frames would hold the pass's tensors"
        assert sequence.length == 0
        engine.forward([Append(sequence, ids[:15], 0)])
        rows = engine.forward([Append(sequence, ids[15:], 5)])
    shadow.assert_rows(rows, ids, "in two parts")
    engine.store.free(sequence)


class _Failing(TorchFunctionMode):
    """Every operation on more rows of logits raises the error of the allocator."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self._num_rows = num_rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_large = (
            args
            and isinstance(args[0], torch.Tensor)
            and args[0].dim() == 2
            and args[0].shape[0] > self._num_rows
        )
        if is_large and func is not torch.Tensor.__len__:
            raise ERRORS["cpu"]
        return func(*args, **(kwargs or {}))


def test_sampling_without_memory_is_named(engine_of: Callable[[str], Engine]) -> None:
    """Not tried for each request alone, as for another error."""
    engine = engine_of("llama")
    sampler = engine.sampler(SamplingParams(temperature=1.0, top_p=0.9), 1, 256)
    ids = np.zeros(40, np.int64)

    def score(num: int) -> list[BlockScores | Exception]:
        request = ScoreRequest(sampler, ids, 1, 1, None)
        return engine.score([request] * num, torch.zeros(num, 256))

    with _Failing(20):
        assert all(isinstance(scores, BlockScores) for scores in score(20))
        with pytest.raises(StepOutOfMemory) as raised:
            score(21)
    assert (raised.value.num_tokens, raised.value.num_rows) == (0, 21)
    assert str(raised.value).startswith("out of memory when sampling from 21 rows of logits: ")


def test_another_error_of_a_pass_is_not_taken_for_it(engine_of: Callable[[str], Engine]) -> None:
    engine = engine_of("llama")
    sequence = engine.store.open(30)
    with failing_above(20, RuntimeError("shape")), pytest.raises(RuntimeError, match="shape"):
        engine.forward([Append(sequence, [1] * 30, 1)])
    engine.store.free(sequence)


def test_the_measured_pass_leaves_nothing(model_dir: Callable[[str], Path]) -> None:
    """A model whose context is shorter than the pass, with as many rows as tokens."""
    num_pages = step_memory.num_pages(700, 100)
    options = EngineOptions(
        str(model_dir("llama")), kv_cache_tokens=num_pages * 16, max_model_len=100
    )
    engine = load_engine(options)
    assert step_memory.step_bytes(engine, 700, 700, RankGroup()) >= 0
    assert engine.store.used_tokens == 0
    engine.store.check_integrity()


def test_the_kv_budget_is_what_the_pass_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU a quarter of it, at most 4 GiB, shared among ranks."""
    layers = [LayerLayout(2, 16, 16, torch.float32, torch.device("cpu"))] * 3
    monkeypatch.setattr(budget, "_available_ram", lambda: 8 << 30)
    per_token = 3 * 2 * (16 + 16) * 4
    assert budget.affordable_tokens(layers, 0) == (2 << 30) // per_token
    step = (4 << 30) * 10 // 11  # with a margin of a tenth: half of the memory
    assert abs(budget.affordable_tokens(layers, step) - (1 << 30) // per_token) <= 1
    assert abs(budget.affordable_tokens(layers, step, 2) - (1 << 29) // per_token) <= 1
    assert budget.affordable_tokens(layers, 9 << 30) == 0


def test_rows_of_a_pass_depend_on_vocabulary_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "_available_ram", lambda: 16 << 30)
    assert step_memory.max_step_rows(131_072, cpu) == 512
    assert step_memory.max_step_rows(1_000, cpu) == step_memory.MAX_ROWS
    monkeypatch.setattr(budget, "_available_ram", lambda: 1 << 20)
    assert step_memory.max_step_rows(131_072, cpu) == 1
