"""Losses of distillation against written-out formulas, in values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider_bench.distill.losses import LOSSES, acceptance

VOCAB = 7


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Target's and draft's, float64 [5, VOCAB]; the draft's require a gradient."""
    generator = torch.Generator().manual_seed(3)
    target, draft = (
        2 * torch.randn(5, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return target, draft.requires_grad_()


def written_out(name: str, p: np.ndarray, q: np.ndarray) -> float:
    """Loss of one position, in plain numpy."""
    alpha = np.minimum(p, q).sum()
    kl = (p * np.log(p / q)).sum()
    weight = np.exp(-3 * alpha)
    formulas = {
        "kl": kl,
        "reverse-kl": (q * np.log(q / p)).sum(),
        "tv": 0.5 * np.abs(p - q).sum(),
        "lk-alpha": -np.log(alpha),
        "lk-lambda": weight * kl + (1 - weight) * (1 - alpha),
    }
    return float(formulas[name])


def written_out_gradient(name: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Derivative of the loss by the draft's logits: dq_i/dz_j = q_i (1[i = j] - q_j)."""
    alpha = np.minimum(p, q).sum()
    counted = (q < p).astype(float)  # only there does min(p, q) depend on q
    alpha_gradient = q * (counted - (counted * q).sum())
    kl_gradient = q - p
    log_ratio = np.log(q / p)
    weight = np.exp(-3 * alpha)
    return {
        "kl": kl_gradient,
        "reverse-kl": q * (log_ratio - (q * log_ratio).sum()),
        "tv": -alpha_gradient,
        "lk-alpha": -alpha_gradient / alpha,
        "lk-lambda": weight * kl_gradient - (1 - weight) * alpha_gradient,
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(
    name: str, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    target, draft = logits
    losses = LOSSES[name](target.log_softmax(-1), draft.log_softmax(-1))
    (gradient,) = torch.autograd.grad(losses.sum(), draft)
    p, q = target.softmax(-1).numpy(), draft.detach().softmax(-1).numpy()
    for row in range(len(p)):
        assert losses[row].item() == pytest.approx(written_out(name, p[row], q[row]), abs=1e-12)
        np.testing.assert_allclose(
            gradient[row].numpy(), written_out_gradient(name, p[row], q[row]), atol=1e-12
        )


@pytest.mark.parametrize("name", LOSSES)
def test_equal_distributions_have_no_loss(
    name: str, logits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    target = logits[0].log_softmax(-1)
    assert LOSSES[name](target, target).abs().max().item() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_finite_without_overlap(name: str) -> None:
    """Each is sure of another token: α is 0 in float32."""
    target, draft = torch.zeros(2, VOCAB)
    target[0], draft[1] = 200.0, 200.0
    draft.requires_grad_()
    loss = LOSSES[name](target.log_softmax(-1), draft.log_softmax(-1))
    (gradient,) = torch.autograd.grad(loss, draft)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    if name in ("kl", "lk-alpha", "lk-lambda"):
        assert gradient[0] < 0, "the loss asks for more of the target's token"


def test_acceptance_is_one_minus_total_variation(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    p, q = (side.detach().softmax(-1) for side in logits)
    alpha = acceptance(p.log(), q.log())
    torch.testing.assert_close(alpha, 1 - 0.5 * (p - q).abs().sum(-1))
