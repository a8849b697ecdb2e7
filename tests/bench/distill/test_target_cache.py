"""Cached distributions of a distillation's target: what they estimate, and when it runs."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from outrider_bench.distill.distributions import PartialDistributions, partial_distributions
from outrider_bench.distill.losses import forward_kl, total_variation
from outrider_bench.distill.rows import Batch, Row
from outrider_bench.distill.target_cache import TargetCache
from outrider_bench.distill.train import distillation_loss
from tests.tiny_models import build_tiny_model

ROWS = [Row(tuple(random.Random(i).choices(range(200), k=12 + i % 5)), 4, 1.0) for i in range(4)]


@pytest.fixture
def target() -> Any:
    return build_tiny_model("llama", num_layers=3).requires_grad_(False)


def test_partial_distributions_estimate_losses_without_bias() -> None:
    """Mean over 4,000 draws of the rest; false alarm below 1 in 10,000 (four standard errors)."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn((1, 300), generator=generator)
    draft = target + torch.randn((1, 300), generator=generator)
    p, q = target.log_softmax(-1), draft.log_softmax(-1)
    found = partial_distributions(target.expand(4000, -1), generator, num_top=20)
    for loss in (forward_kl, total_variation):
        estimates = loss(*found.compared(draft.expand(4000, -1)))
        error = float(estimates.std()) / 4000**0.5
        assert abs(float(estimates.mean()) - float(loss(p, q))) < 4 * error + 1e-3  # float16
    whole = partial_distributions(target, generator, num_top=300)
    assert forward_kl(*whole.compared(draft)).item() == pytest.approx(
        forward_kl(p, q).item(), abs=0.01
    )


def test_recorded_tokens_count_the_rest_as_one() -> None:
    """Ids beyond the common vocabulary have probability 0."""
    draft = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    recorded = PartialDistributions.recorded([[0, 4, 1]], [[-0.7, -0.9, -3.0]])
    p, q = recorded.within(4, torch.device("cpu")).compared(draft)
    log_probs = draft[0, :4].log_softmax(-1)
    assert p[0].exp().tolist() == pytest.approx([0.4966, 0.0, 0.0498, 0.4536], abs=1e-3)
    assert q[0, [0, 2]].tolist() == pytest.approx(log_probs[:2].tolist(), abs=1e-5)


def _num_forward_passes(model: Any) -> list[int]:
    """A list that has the number of rows of every forward pass from now on."""
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_the_target_runs_once_per_row(target: Any) -> None:
    """In later epochs its distributions are those of the first."""
    draft = build_tiny_model("llama", seed=4).requires_grad_(False)
    cache = TargetCache(target, ROWS, vocab_size=256, max_bytes=1 << 20)
    passes = _num_forward_passes(target)
    first = cache.batch([3, 1, 2])
    assert len(passes) == 1
    again = cache.batch([1, 2, 3])
    assert len(passes) == 1
    assert cache.num_bytes == 384 * sum(ROWS[i].num_output_tokens for i in (1, 2, 3))
    losses = [distillation_loss(target, draft, batch, forward_kl) for batch in (first, again)]
    exact = distillation_loss(target, draft, Batch.of(ROWS[1:4]), forward_kl)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.01)
    assert losses[0].item() == pytest.approx(exact.item(), rel=0.1)


def test_a_full_cache_computes_the_others_at_each_use(target: Any) -> None:
    size = 384 * ROWS[0].num_output_tokens
    cache = TargetCache(target, ROWS, vocab_size=256, max_bytes=size)
    passes = _num_forward_passes(target)
    for _ in range(2):
        assert cache.batch([0]).target is not None
        assert cache.batch([1]).target is not None
    assert len(passes) == 3
    assert cache.num_bytes == size


def test_the_target_does_not_run_for_recorded_probabilities(target: Any) -> None:
    num = ROWS[0].num_output_tokens
    top = PartialDistributions.recorded([[5, 6]] * num, [[-0.2, -2.0]] * num)
    cache = TargetCache(
        target, [dataclasses.replace(ROWS[0], top=top)], vocab_size=256, max_bytes=0
    )
    passes = _num_forward_passes(target)
    batch = cache.batch([0])
    assert not passes
    assert batch.target is not None
    assert torch.equal(batch.target.log_probs, top.log_probs)
