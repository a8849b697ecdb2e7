"""Invalid appends are refused, and a refused or failed forward pass changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from outrider.engine import Append, Engine, Sequence


@pytest.fixture
def engine(engine_of: Callable[[str], Engine]) -> Engine:
    return engine_of("llama")


@pytest.fixture
def sequence(engine: Engine) -> Iterator[Sequence]:
    sequence = engine.store.open(20)
    engine.forward([Append(sequence, [1, 2, 3], 0)])
    yield sequence
    engine.store.free(sequence)


def test_logits_are_in_the_order_of_the_appends(engine: Engine, sequence: Sequence) -> None:
    """Last rows of each append; arrays and lists of token ids; no rows if none are requested."""
    other = engine.store.open(10)
    logits = engine.forward(
        [Append(other, np.array([4, 5, 6], dtype=np.int32), 1), Append(sequence, [7, 8], 2)]
    )
    assert logits.shape == (3, 256)
    assert logits.dtype == torch.float32
    assert (sequence.length, other.length) == (5, 3)
    assert engine.forward([Append(other, [1, 2], 0)]).shape == (0, 256)
    assert engine.forward([]).shape == (0, 256)
    engine.store.free(other)


@pytest.mark.parametrize(
    ("token_ids", "num_logits", "why"),
    [
        ([], 0, "non-empty"),
        ([[1]], 0, "non-empty"),
        ([1], 2, "num_logits is 2 for 1 tokens"),
        ([1], -1, "num_logits is -1"),
        (list(range(18)), 1, "18 tokens do not fit"),
        ([256], 1, r"outside \[0, 256\)"),
        ([-1], 1, r"outside \[0, 256\)"),
    ],
)
def test_invalid_appends_are_refused(
    engine: Engine, sequence: Sequence, token_ids: list[int], num_logits: int, why: str
) -> None:
    other = engine.store.open(10)
    with pytest.raises(ValueError, match=why):
        engine.forward([Append(other, [1], 1), Append(sequence, token_ids, num_logits)])
    assert (sequence.length, other.length) == (3, 0)
    engine.store.free(other)


def test_a_sequence_listed_twice_is_refused(engine: Engine, sequence: Sequence) -> None:
    with pytest.raises(ValueError, match="listed twice"):
        engine.forward([Append(sequence, [1], 1), Append(sequence, [2], 1)])
    assert sequence.length == 3


def test_a_freed_or_foreign_sequence_is_refused(
    engine: Engine, engine_of: Callable[[str], Engine]
) -> None:
    freed = engine.store.open(4)
    engine.store.free(freed)
    with pytest.raises(ValueError, match="not open in this engine's store"):
        engine.forward([Append(freed, [1], 1)])
    foreign = engine_of("gpt2").store.open(4)
    with pytest.raises(ValueError, match="not open in this engine's store"):
        engine.forward([Append(foreign, [1], 1)])
    engine_of("gpt2").store.free(foreign)


def test_appends_beyond_the_context_are_refused(engine: Engine) -> None:
    sequence = engine.store.open(600)
    engine.forward([Append(sequence, [1] * 510, 0)])
    with pytest.raises(ValueError, match="context is 512"):
        engine.forward([Append(sequence, [1, 2, 3], 1)])
    assert engine.forward([Append(sequence, [1, 2], 1)]).shape == (1, 256)
    engine.store.free(sequence)


def test_a_failure_in_the_model_changes_nothing(
    engine: Engine, sequence: Sequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same append gives the same logits afterwards."""
    expected = engine.forward([Append(sequence, [9, 10], 2)])
    engine.store.truncate(sequence, 3)

    def fail(*_: object) -> None:
        raise RuntimeError("device fell over")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model.module.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="fell over"):
            engine.forward([Append(sequence, [9, 10], 2)])
    assert sequence.length == 3
    engine.store.check_integrity()
    assert torch.equal(engine.forward([Append(sequence, [9, 10], 2)]), expected)
