"""Selections and Gumbel-max races over many rows, against whole rows in double precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from outrider.engine.interface import NUM_CANDIDATES
from outrider.engine.sampling.distributions import Distributions
from outrider.engine.sampling.gumbel_max import best
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Purpose, stream_key, token_gumbels
from outrider.sampling.warp import log_softmax


@pytest.mark.parametrize("size", [1, 9, 1023, 1024, 4099, 20_000])
@pytest.mark.parametrize("num", [1, 8, 32, 600])
def test_best_is_topk(size: int, num: int) -> None:
    """The same values, and ids that have these values."""
    scores = torch.from_numpy(np.random.default_rng(size).normal(size=(5, size)))
    values, ids = best(scores, num)
    assert torch.equal(values, scores.topk(min(num, size)).values)
    assert torch.equal(scores.gather(-1, ids), values)


def _logits_by_shape() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    size, num = 3000, 150
    peaked = rng.normal(0, 1, (num, size))
    peaked[:, 17] += 20
    return {
        "flat": np.zeros((num, size), np.float32),
        "normal": rng.normal(0, 4, (num, size)).astype(np.float32),
        "peaked": peaked.astype(np.float32),
        "steps": np.repeat(-rng.exponential(9, (num, 30)), 100, axis=1).astype(np.float32),
        "geometric": np.tile(-np.arange(size, dtype=np.float32), (num, 1)),
    }


@pytest.mark.parametrize("kind", ["flat", "normal", "peaked", "steps", "geometric"])
@pytest.mark.parametrize("width", [1, 3, 8, 32])
def test_a_race_is_won_by_the_argmax_of_the_whole_row(kind: str, width: int) -> None:
    """Whatever the width: if the candidates do not suffice, the whole row is scored."""
    logits = _logits_by_shape()[kind]
    keys = np.array([stream_key(8, Purpose.TARGET, i) for i in range(len(logits))])
    num = min(width, NUM_CANDIDATES)
    ids, scores = Distributions(torch.from_numpy(logits), [SamplingParams()] * len(logits)).race(
        keys, num, width
    )
    exact = log_softmax(logits) + token_gumbels(keys, np.arange(logits.shape[-1]))
    order = np.argsort(-exact, -1)[:, :num]
    assert ids.tolist() == order.tolist()
    assert np.abs(scores - np.take_along_axis(exact, order, -1)).max() < 1e-9
