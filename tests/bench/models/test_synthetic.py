"""Synthetic pairs: the checkpoints behave as `pair.json` reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from outrider.engine.loading.linear_kernels import half_exponent
from outrider.engine.loading.loaded_model import cache_argument
from outrider.errors import ConfigError
from outrider_bench.models.synthetic import PairReport, make_pair
from outrider_bench.models.synthetic_pair import noisy_copy

_ALPHA = 0.8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PairReport]:
    directory = tmp_path_factory.mktemp("pair")
    return directory, make_pair(directory, "tiny", alpha=_ALPHA)


def test_checkpoints_have_the_reported_acceptance_rate(made: tuple[Path, PairReport]) -> None:
    """Loaded separately, with other prompts: α over 3,072 positions, each of probability α = 0.8.

    Standard deviation 0.0072, plus up to 0.01 from the search: 0.05 is over five of them, so a
    false alarm is rarer than one in a million.
    """
    directory, report = made
    agreed = _greedy_agreement(directory, num_prompts=64, num_tokens=48)
    assert abs(report.greedy_acceptance - _ALPHA) <= 0.01
    assert abs(agreed - report.greedy_acceptance) < 0.05
    assert report.epsilon > 0


@torch.inference_mode()
def _greedy_agreement(directory: Path, *, num_prompts: int, num_tokens: int) -> float:
    """Share of equal argmaxes along the target's own greedy continuations."""
    models = [AutoModelForCausalLM.from_pretrained(directory / n) for n in ("target", "draft")]
    caches = [{cache_argument(model): DynamicCache(config=model.config)} for model in models]
    shape, generator = (num_prompts, 16), torch.Generator().manual_seed(1234)
    ids = torch.randint(0, models[0].config.vocab_size - 1, shape, generator=generator)
    agreed = []
    for _ in range(num_tokens):
        chosen = [
            model(input_ids=ids, logits_to_keep=1, **cache).logits[:, -1].argmax(-1)
            for model, cache in zip(models, caches, strict=True)
        ]
        agreed.append((chosen[0] == chosen[1]).float())
        ids = chosen[0][:, None]
    return float(torch.stack(agreed).mean())


def test_noise_makes_another_model_with_the_same_files(
    made: tuple[Path, PairReport], tmp_path: Path
) -> None:
    """The drafts of `outrider bench swap`: the same architecture, other weights."""
    directory = noisy_copy(made[0] / "draft", tmp_path / "old", 0.2)
    assert {path.name for path in directory.iterdir()} == {
        path.name for path in (made[0] / "draft").iterdir()
    }
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path).lm_head.weight.detach().float()
        for path in (directory, made[0] / "draft")
    )
    assert float((ours - theirs).std() / theirs.std()) == pytest.approx(0.2, rel=0.05)


def test_pair_json_is_the_report(made: tuple[Path, PairReport]) -> None:
    """The draft is smaller; logits are peaked like a real model's."""
    directory, report = made
    assert PairReport(**json.loads((directory / "pair.json").read_text())) == report
    assert report.draft_parameters < report.target_parameters
    assert report.entropy_nats == pytest.approx(2.0, abs=0.3)
    assert 0 < report.sampled_acceptance < 1


def test_same_seed_gives_the_same_files(made: tuple[Path, PairReport], tmp_path: Path) -> None:
    """Byte for byte, whatever the state of torch's global generator."""
    directory, report = made
    torch.randn(3)
    before = torch.get_rng_state()
    assert make_pair(tmp_path, "tiny", alpha=_ALPHA) == report
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("target", "draft"):
        file = Path(name) / "model.safetensors"
        assert (tmp_path / file).read_bytes() == (directory / file).read_bytes()


def test_alpha_can_be_chosen_at_temperature_1(tmp_path: Path) -> None:
    """Acceptance rate of rejection sampling; with a given vocabulary size."""
    report = make_pair(tmp_path, "tiny", alpha=0.6, temperature=1.0, vocab_size=300)
    assert abs(report.sampled_acceptance - 0.6) <= 0.01
    assert report.vocab_size == 300


def test_a_given_epsilon_is_not_searched(tmp_path: Path) -> None:
    """It is measured once per temperature; α is not reported as requested. At 0 all agree."""
    measurements: list[dict[str, float]] = []
    report = make_pair(tmp_path, "tiny", epsilon=0.0, progress=measurements.append)
    assert measurements == [{"epsilon": 0.0, "alpha": 1.0}]
    assert report.alpha is None
    assert report.greedy_acceptance == 1.0
    assert report.sampled_acceptance == pytest.approx(1.0, abs=1e-5)


def test_checkpoints_have_the_dtype(tmp_path: Path) -> None:
    """Every layer is exact in 16 bits, as the engine finds at load."""
    report = make_pair(tmp_path, "tiny", epsilon=0.05, dtype="float16")
    assert report.dtype == "float16"
    for name in ("target", "draft"):
        weights = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
    layers = [weight.float() for weight in weights.values() if weight.dim() == 2]
    assert all(half_exponent(weight) is not None for weight in layers)


def test_incomplete_pair_has_no_report(tmp_path: Path) -> None:
    """The report of an earlier pair is deleted before any of its files is overwritten."""
    make_pair(tmp_path, "tiny", epsilon=0.1)
    seen = []
    make_pair(
        tmp_path,
        "tiny",
        epsilon=0.2,
        progress=lambda _: seen.append((tmp_path / "pair.json").exists()),
    )
    assert seen == [False]
    assert (tmp_path / "pair.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "huge"}, "size: 'huge'"),
        ({"alpha": 1.0}, "alpha: 1"),
        ({"temperature": 0.5}, "temperature: "),
        ({"epsilon": -1.0}, "epsilon: -1"),
        ({"vocab_size": 2}, "vocab_size: 2"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
    ],
)
def test_invalid_arguments_are_rejected_by_name(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    """Before anything is built."""
    with pytest.raises(ConfigError, match=message):
        make_pair(tmp_path, **{"size": "tiny", **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_program_prints_each_measurement_then_the_report(tmp_path: Path) -> None:
    """JSON lines on standard output; exit status 2 and the name of the invalid argument."""
    flags = ["--size=tiny", "--num-threads=1"]  # more threads are slow on a busy machine
    module = [sys.executable, "-m", "outrider_bench.models.synthetic", str(tmp_path), *flags]
    ended = subprocess.run(module, capture_output=True, text=True, check=True)
    *measured, report = [json.loads(line) for line in ended.stdout.splitlines()]
    assert measured
    assert all(set(line) == {"epsilon", "alpha"} for line in measured)
    assert report == json.loads((tmp_path / "pair.json").read_text())
    rejected = subprocess.run([*module, "--alpha=2"], capture_output=True, text=True, check=False)
    assert rejected.returncode == 2
    assert "alpha: 2" in rejected.stderr
