"""Quickstart pair: lossless tokenizer, exact inflation, small files, draft agrees with target.

Uses the shipped weights on the CPU; no network. The prompts are embedded, because the standard
library differs between Python versions.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from outrider import quickstart_pair as quickstart
from outrider.engine.loading.inflate import compare, inflate, inflated_config
from outrider.errors import ConfigError
from outrider.quickstart_pair import DRAFT_PATH, PAIR_PATH, TARGET_PATH
from outrider_bench.distill.optimise import TrainingEvent
from outrider_bench.quickstart.architecture import num_parameters
from outrider_bench.quickstart.card import write_card
from outrider_bench.quickstart.corpus import SPECIAL_TOKENS, load_corpus
from outrider_bench.quickstart.evaluate import PairReport, evaluate, greedy_alpha, sampled_alpha
from outrider_bench.quickstart.rollout import continue_rows
from outrider_bench.quickstart.storage import load, load_tokenizer
from outrider_bench.quickstart.train import TrainingConfig, TrainingResult, train
from tests.bench.quickstart.small_training import CORPUS, PROMPTS, SHORT, small
from tests.cli.processes import ROOT, TIMEOUT_S, environment

_NUM_PROMPT_TOKENS = 32


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return load(TARGET_PATH)


@pytest.fixture(scope="module")
def draft() -> LlamaForCausalLM:
    return load(DRAFT_PATH)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(TARGET_PATH)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(text)[:_NUM_PROMPT_TOKENS] for text in PROMPTS])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", " ,", "'s"])).map("".join))
def test_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_target_and_draft_have_the_same_tokenizer() -> None:
    name = "tokenizer.json"
    assert (TARGET_PATH / name).read_bytes() == (DRAFT_PATH / name).read_bytes()


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add two numbers."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|user|>Add two numbers.<|end|><|assistant|>"
    assert len(tokenizer.encode("<|user|><|end|>")) == 2


def test_finding_the_pair_needs_no_torch() -> None:
    """Runs the module alone, without its parent package."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, quickstart.__file__], check=True)


def test_pair_is_small_and_the_draft_much_smaller(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    size_bytes = sum(path.stat().st_size for path in PAIR_PATH.rglob("*") if path.is_file())
    assert size_bytes < 25_000_000
    assert num_parameters(target) >= 5 * num_parameters(draft)
    end_ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert target.generation_config.eos_token_id == end_ids
    assert target.config.vocab_size == draft.config.vocab_size == len(tokenizer)


def test_draft_agrees_with_its_target(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, prompts: torch.Tensor
) -> None:
    assert greedy_alpha(target, draft, prompts, num_new_tokens=64) >= 0.6
    assert sampled_alpha(target, draft, prompts, num_new_tokens=64, seed=0) >= 0.5


def test_a_model_agrees_with_itself(target: LlamaForCausalLM, prompts: torch.Tensor) -> None:
    assert greedy_alpha(target, target, prompts, num_new_tokens=16) == 1.0
    assert sampled_alpha(target, target, prompts, num_new_tokens=16, seed=0) == pytest.approx(
        1.0, abs=1e-5
    )


@pytest.mark.parametrize("part", ["target", "draft"])
def test_inflation_preserves_the_function(
    part: str, request: pytest.FixtureRequest, prompts: torch.Tensor
) -> None:
    model: LlamaForCausalLM = request.getfixturevalue(part)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    large = inflate(model, 30_000_000)
    assert num_parameters(large) == pytest.approx(30e6, rel=0.03)
    report = compare(model, large, prompts)
    assert report.same_argmax
    assert report.max_logit_difference < 1e-3
    assert _greedy(model, prompts).equal(_greedy(large, prompts))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def _greedy(model: LlamaForCausalLM, prompts: torch.Tensor) -> torch.Tensor:
    return continue_rows(
        model,
        prompts,
        num_new_tokens=12,
        temperatures=torch.zeros(len(prompts)),
        generator=torch.Generator(),
    )


@pytest.mark.parametrize("millions", [30, 100, 300, 1000])
def test_inflated_shapes_are_those_of_real_models(target: LlamaForCausalLM, millions: int) -> None:
    config = inflated_config(target.config, millions * 1_000_000)
    assert 16 <= config.num_hidden_layers <= 24
    assert config.hidden_size % 64 == config.intermediate_size % 64 == 0
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.num_attention_heads == 2 * config.num_key_value_heads


def test_inflation_below_the_models_own_size_is_refused(target: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="no shape of 1000000 parameters"):
        inflate(target, 1_000_000)


def test_training_is_reproducible(tmp_path: Path) -> None:
    corpus, config = CORPUS, small(num_target_steps=6, num_draft_steps=4)
    events: list[TrainingEvent] = []
    result = train(tmp_path / "first", config, corpus=corpus, progress=events.append)
    assert result == TrainingResult(num_target_steps=6, num_draft_steps=4)
    train(tmp_path / "second", config, corpus=corpus)
    assert {event.stage for event in events} == {"target", "rollouts", "draft"}
    for part in ("target", "draft"):
        first, second = (load(tmp_path / run / part) for run in ("first", "second"))
        for name, tensor in first.state_dict().items():
            torch.testing.assert_close(tensor, second.state_dict()[name])
    report = evaluate(tmp_path / "first", SHORT, corpus=corpus)
    assert 0.0 <= report.greedy_alpha <= 1.0
    assert report.num_target_parameters > report.num_draft_parameters


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["target", "draft"])
def test_ctrl_c_during_training_saves_the_models(stage: str, tmp_path: Path) -> None:
    """The model is saved as it is and the card reports it; a draft can be trained later."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.quickstart.small_training", tmp_path, stage],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(f"{stage} 25/"):
                    break
            process.send_signal(signal.SIGINT)
            lines.append(process.stdout.read())
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
    output = "".join(lines)
    assert status == 128 + signal.SIGINT, output
    assert "takes at most " in lines[0]
    assert "Ctrl-C saves the models trained so far" in lines[0]
    assert " left of this stage" in output
    assert "interrupted: " in output
    assert "Traceback" not in output
    card = (tmp_path / "CARD.md").read_text("utf-8")
    assert "Interrupted by Ctrl-C." in card
    assert load(tmp_path / "target").num_parameters() > 0
    assert (tmp_path / "draft").exists() == (stage == "draft")
    if stage == "target":
        assert f"--target {tmp_path / 'target'}" in output
        assert "last training loss" in card
    else:
        assert "held-out loss" in card
    # The same call goes on, and has enough steps: it finishes the pair.
    steps = {"target": 6, "draft": 4, stage: 20}
    config = small(num_target_steps=steps["target"], num_draft_steps=steps["draft"])
    again = train(tmp_path, config, corpus=CORPUS)
    taken = {"target": again.num_target_steps, "draft": again.num_draft_steps}
    assert taken.pop(stage) >= 25
    assert taken.items() <= steps.items()
    assert not (tmp_path / "checkpoints").exists()


def test_packages_are_added_to_the_standard_library() -> None:
    both, alone = (load_corpus(packages=packages) for packages in (("rich",), ()))
    assert set(alone.train) < set(both.train)
    assert any("from rich" in text for text in both.train)
    with pytest.raises(ConfigError, match="--packages: 'absent' is not an installed package"):
        load_corpus(packages=("absent",))


def test_a_training_of_hours_is_limited_by_time_alone() -> None:
    config = TrainingConfig().lasting(2.0)
    draft = config.distill
    total_s = config.target_limits.time_budget_s + draft.rollout_budget_s
    assert total_s + draft.limits.time_budget_s == pytest.approx(7200)
    assert min(config.target_limits.num_steps, draft.limits.num_steps, draft.num_rollouts) >= 10**9


def test_the_card_names_the_packages_and_their_licences(tmp_path: Path) -> None:
    report = PairReport(0.8, 0.7, 0.6, 2.5, 3.5, 5_000_000, 1_000_000, num_prompts=96)
    write_card(tmp_path, report, TrainingConfig(packages=("rich",)), steps="Steps taken: 1.")
    card = (tmp_path / "CARD.md").read_text("utf-8")
    assert f"and rich {version('rich')}, without tests" in card
    assert "on rich, under its licence (MIT)" in card
    assert "`outrider quickstart train --out DIR --packages rich`" in card
