"""Acceptance along the target's text: against transformers' numbers, and on known pairs."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from outrider.sampling.support import MAX_SUPPORT_SIZE
from outrider_bench.check.acceptance import Comparison, Job, compared
from outrider_bench.models.synthetic import make_pair
from tests.tiny_models import make_tiny_draft, make_tiny_model

VOCAB_SIZE = 256


def job(target: Path, draft: Path, **more: object) -> Job:
    prompts = [("a", [3, 5, 7]), ("b", [11, 2, 9, 4, 200, 31])]
    made = Job(
        str(target), str(draft), "float32", "cpu", "cpu", prompts, [0.0, 1.0], 12, ignore_eos=True
    )
    return dataclasses.replace(made, **more)


def all_of(made: Job) -> list[Comparison]:
    return [one for batch in compared(made) for one in batch]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("acceptance")
    target = make_tiny_model("llama", directory / "target", scale=0.4)
    return target, make_tiny_draft(target, directory / "draft", noise=0.3)


def test_greedy_comparison_is_the_agreement_of_transformers_argmaxes(
    pair: tuple[Path, Path],
) -> None:
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in pair
    )
    for one, (task, prompt) in zip(
        all_of(job(*pair, temperatures=[0.0])), job(*pair).prompts, strict=True
    ):
        ids, agrees = torch.tensor([prompt]), []
        for _ in range(12):
            with torch.inference_mode():
                token_id = target(ids).logits[0, -1].argmax()
                agrees.append(bool(draft(ids).logits[0, -1].argmax() == token_id))
            ids = torch.cat([ids, token_id.view(1, 1)], 1)
        assert (one.task, one.temperature) == (task, 0.0)
        assert one.agrees == agrees
        assert one.overlap == one.accepted == [float(agree) for agree in agrees]
        assert [rank == 0 for rank in one.rank] == agrees


def test_overlap_at_a_temperature_is_the_sum_of_minima(pair: tuple[Path, Path]) -> None:
    """At the first token, whose context is the prompt."""
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in pair
    )
    for one, (_, prompt) in zip(
        all_of(job(*pair, temperatures=[0.7])), job(*pair).prompts, strict=True
    ):
        with torch.inference_mode():
            probs = [(m(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1) for m in
                     (target, draft)]  # fmt: skip
        assert one.overlap[0] == pytest.approx(float(torch.minimum(*probs).sum()), abs=1e-4)


def test_acceptance_of_emitted_tokens_averages_to_the_overlap(pair: tuple[Path, Path]) -> None:
    """E[min(1, q(x)/p(x))] for x from p is Σ min(p, q), apart from the cut of q.

    Seeds are fixed, so this cannot fail by chance; five standard errors.
    """
    prompts = [("", [int(i)]) for i in np.random.default_rng(0).integers(0, VOCAB_SIZE - 1, 128)]
    found = all_of(job(*pair, temperatures=[0.7], prompts=prompts, max_tokens=16))
    overlap = [value for one in found for value in one.overlap]
    accepted = [value for one in found for value in one.accepted]
    error = statistics.stdev(accepted) / len(accepted) ** 0.5
    # The cut drops at most 1 % of q, or what is beyond the first tokens.
    assert MAX_SUPPORT_SIZE == 32
    assert statistics.fmean(accepted) == pytest.approx(
        statistics.fmean(overlap), abs=5 * error + 0.02
    )


def test_texts_end_at_eos_unless_it_is_ignored(pair: tuple[Path, Path]) -> None:
    """The target's most likely EOS comes late; a prompt that is followed by EOS ends at once."""
    prompts = [("", [i]) for i in range(100)]
    ended = all_of(job(*pair, temperatures=[1.0], prompts=prompts, ignore_eos=False))
    ignored = all_of(job(*pair, temperatures=[1.0], prompts=prompts))
    assert all(len(one.overlap) == 12 for one in ignored)
    assert any(len(one.overlap) < 12 for one in ended)
    assert all(one.overlap for one in ended)


def test_a_draft_with_fewer_tokens_is_compared_on_those_it_has(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    draft = make_tiny_draft(pair[0], tmp_path, noise=0.0, vocab_size=200)
    found = all_of(job(pair[0], draft, temperatures=[1.0], max_tokens=32))
    assert all(0 <= value <= 1 + 1e-9 for one in found for value in one.overlap)
    assert any(value < 0.999 for one in found for value in one.overlap)


# (temperature, α, ε of the tiny size that gives it).
KNOWN = [(0.0, 0.2, 0.5099), (1.0, 0.5, 0.2674), (0.0, 0.8, 0.06892), (1.0, 0.9, 0.0487)]


@pytest.mark.parametrize(("temperature", "alpha", "epsilon"), KNOWN)
def test_alpha_of_a_pair_of_known_acceptance(
    temperature: float, alpha: float, epsilon: float, tmp_path: Path
) -> None:
    """Within 0.02 of what the pair was made for, on other prompts. Seeds are fixed."""
    made = make_pair(tmp_path, "tiny", epsilon=epsilon)
    generator = np.random.default_rng(5)
    prompts = [("", generator.integers(0, made.vocab_size - 1, 16).tolist()) for _ in range(128)]
    one = job(tmp_path / "target", tmp_path / "draft", prompts=prompts, max_tokens=48)
    found = all_of(dataclasses.replace(one, temperatures=[temperature]))
    measured = statistics.fmean(value for text in found for value in text.overlap)
    assert measured == pytest.approx(alpha, abs=0.02)
