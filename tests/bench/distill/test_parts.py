"""Parts of a distillation: prompts, rows, batches, the loop with its checkpoint, the verdict."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.traffic.record import FORMAT
from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from outrider_bench.distill.acceptance import Acceptance, measure_acceptance, worse
from outrider_bench.distill.checkpoint import Checkpoint
from outrider_bench.distill.generate import Job, OwnTarget, batches, generate_rows, training_jobs
from outrider_bench.distill.losses import forward_kl
from outrider_bench.distill.models import first_layers
from outrider_bench.distill.optimise import Limits, Optimiser, Position
from outrider_bench.distill.prompts import held_out, read_prompts
from outrider_bench.distill.rows import (
    Batch,
    Row,
    RowFile,
    read_traffic,
    shuffled_batch,
    without_leaks,
)
from outrider_bench.distill.settings import DistillSettings
from outrider_bench.distill.train import distillation_loss, train_draft
from tests.services.tokenizer_files import write_tokenizer
from tests.tiny_models import build_tiny_model, make_tiny_model

ROWS = [
    Row(tuple(random.Random(i).choices(range(200), k=12 + i % 5)), 4, float(i % 2))
    for i in range(12)
]
LENGTHS = [len(row.token_ids) for row in ROWS]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded is not None
    return loaded


@pytest.fixture
def target() -> Any:
    return build_tiny_model("llama", num_layers=3).requires_grad_(False)


# Prompts and rows


def test_prompts_are_read_from_text_and_from_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo\none\n", "utf-8")
    assert read_prompts(text, tokenizer, max_tokens=100) == [
        tokenizer.encode("one"),
        tokenizer.encode("two"),
    ]
    lines = ['"one"', '{"prompt": "two"}', '{"token_ids": [5, 6, 7, 8]}',
             '{"messages": [{"role": "user", "content": "hi"}]}']  # fmt: skip
    objects = tmp_path / "prompts.jsonl"
    objects.write_text("\n".join(lines), "utf-8")
    assert read_prompts(objects, tokenizer, max_tokens=3) == [
        tokenizer.encode("one")[-3:],
        tokenizer.encode("two")[-3:],
        [6, 7, 8],
        tokenizer.encode("[user]hi\n[assistant]")[-3:],
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('"one"\n{"text": "two"}\n', "line 2: not a prompt: 'prompt'; allowed: a string, or"),
        ('"one"\n[1\n', "line 2: not a prompt"),
        ('"one"\n', "has 1 different prompts; at least 2"),
    ],
)
def test_bad_prompts_are_named(
    lines: str, words: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines, "utf-8")
    with pytest.raises(ConfigError, match="--prompts: ") as caught:
        read_prompts(path, tokenizer, max_tokens=100)
    assert words in str(caught.value)


def test_held_out_prompts_are_not_trained_on() -> None:
    train, chosen = held_out(range(50), seed=1)
    assert (len(train), len(chosen)) == (45, 5)
    assert set(train) | set(chosen) == set(range(50))
    assert held_out(range(50), seed=1) == (train, chosen)
    assert len(held_out(range(5000), seed=1)[1]) == 64
    assert [len(part) for part in held_out(range(2), seed=1)] == [1, 1]


def test_a_killed_writer_loses_its_last_line_alone(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows" / "rows-0.jsonl")
    assert file.read() == []
    file.append(ROWS[:3])
    path = tmp_path / "rows" / "rows-0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert file.read() == ROWS[:2]
    file.append(ROWS[2:4])
    assert file.read() == ROWS[:4]


def recorded(row: Row, **changes: Any) -> str:
    """A line of recorded traffic."""
    fields = {
        "format": FORMAT, "tokenizer": "t", "model": "m", "temperature": row.temperature,
        "prompt_token_ids": row.token_ids[: row.prompt_len],
        "output_token_ids": row.token_ids[row.prompt_len :],
        "top_token_ids": [[7, 8]] * row.num_output_tokens,
        "top_logprobs": [[-0.5, -1.5]] * row.num_output_tokens,
    }  # fmt: skip
    return json.dumps({**fields, **changes}) + "\n"


def test_recorded_traffic_is_read(tmp_path: Path) -> None:
    """The latest file first; each generation once, without those of another tokenizer."""
    (tmp_path / "traffic-2.jsonl").write_text(recorded(ROWS[1]) + recorded(ROWS[2]), "utf-8")
    other = recorded(ROWS[4], tokenizer="another")
    (tmp_path / "traffic-1.jsonl").write_text(
        recorded(ROWS[3]) + other + recorded(ROWS[1]) + recorded(ROWS[5])[:-3], "utf-8"
    )
    read = partial(read_traffic, tmp_path, model="m")
    rows = read(tokenizer="t", max_prompt_tokens=100, max_rows=10)
    assert rows == [ROWS[1], ROWS[2], ROWS[3]]
    (cut, *_) = read(tokenizer="t", max_prompt_tokens=3, max_rows=2)
    assert cut == Row(ROWS[1].token_ids[1:], 3, ROWS[1].temperature)
    with pytest.raises(ConfigError, match=r"has 1 different generations .*, and 4 of another"):
        read(tokenizer="another", max_prompt_tokens=9, max_rows=9)
    file = RowFile(tmp_path / "rows.jsonl")
    file.append(rows)
    for row in file.read():
        assert row.top is not None
        assert row.top.token_ids.tolist() == [[7, 8]] * row.num_output_tokens
        assert row.top.log_probs.tolist() == [[-0.5, -1.5]] * row.num_output_tokens
    of_another = read_traffic(
        tmp_path, model="other", tokenizer="t", max_prompt_tokens=9, max_rows=9
    )
    assert [row.top for row in of_another] == [None] * 3


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "traffic-1.jsonl").write_text(recorded(ROWS[0], format="other/2"), "utf-8")
    with pytest.raises(ConfigError, match=r"--traffic: .*: not recorded traffic: .*other/2"):
        read_traffic(tmp_path, tokenizer="t", model="m", max_prompt_tokens=9, max_rows=9)


def test_later_turns_of_a_held_out_conversation_are_not_trained_on() -> None:
    turn = Row((1, 2, 3, 4, 5), 3, 0.0)
    later = Row((1, 2, 3, 4, 5, 6, 7, 8), 6, 0.0)
    other = Row((1, 2, 3, 9, 9), 3, 0.0)  # the same prompt, another output
    assert without_leaks([later, other, ROWS[0]], [turn]) == [other, ROWS[0]]


def test_each_row_is_in_one_batch_per_epoch() -> None:
    lengths = [10] * 12
    epochs = [
        sorted(
            i for step in range(4 * n, 4 * n + 4) for i in shuffled_batch(lengths, 3, step, seed=5)
        )
        for n in range(2)
    ]
    assert epochs == [list(range(12))] * 2
    assert shuffled_batch(lengths, 3, 0, seed=5) != shuffled_batch(lengths, 3, 4, seed=5)
    assert sorted(shuffled_batch([9, 9], 16, 7, seed=5)) == [0, 1]


def test_rows_of_a_batch_have_similar_lengths() -> None:
    lengths = [random.Random(i).randrange(500) for i in range(64)]
    steps = [shuffled_batch(lengths, 4, step, seed=2) for step in range(16)]
    assert sorted(i for step in steps for i in step) == list(range(64))
    by_rank = sorted(range(64), key=lengths.__getitem__)
    expected = sorted(sorted(lengths[i] for i in by_rank[n : n + 4]) for n in range(0, 64, 4))
    assert sorted(sorted(lengths[i] for i in step) for step in steps) == expected


def test_rows_are_used_sixteen_times_unless_steps_are_given() -> None:
    settings = DistillSettings(target="t", out=Path("o"))
    assert settings.max_steps(288, rows_per_step=16) == 288
    assert settings.max_steps(2, rows_per_step=64) == 1
    assert dataclasses.replace(settings, steps=500).max_steps(288, rows_per_step=16) == 500


# Generation


def test_greedy_rows_are_the_targets_own(target: Any) -> None:
    """Prompts of different lengths in one batch: each is continued as if it were alone."""
    prompts = [tuple(range(3, 3 + length)) for length in (2, 5, 9)]
    rows = OwnTarget(target, max_tokens=6)([Job(ids, 0.0) for ids in prompts], seed=0)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = list(prompt)
        for _ in range(6):
            logits = target(input_ids=torch.tensor([expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
            if expected[-1] == target.config.eos_token_id:
                break
        assert row == Row(tuple(expected), len(prompt), 0.0)


def test_sampled_rows_follow_the_targets_distribution(target: Any) -> None:
    """First tokens of 4,000 rows. χ² with at least 5 expected per cell; false alarm 1 in 10,000."""
    from scipy import stats

    prompt = (7, 8, 9)
    generate = OwnTarget(target, max_tokens=1)
    rows = [
        row for seed in range(4) for row in generate([Job(prompt, 0.7)] * 1000, seed=1000 * seed)
    ]
    logits = target(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    expected = 4000 * (logits / 0.7).softmax(-1).double()
    counts = torch.bincount(torch.tensor([row.token_ids[3] for row in rows]), minlength=256)
    large = expected >= 5
    observed = [*counts[large].tolist(), int(counts[~large].sum())]
    wanted = [*expected[large].tolist(), float(expected[~large].sum())]
    wanted[-1] += sum(observed) - sum(wanted)  # rounding
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_a_run_that_goes_on_generates_the_missing_rows(target: Any) -> None:
    jobs = training_jobs([[i, i + 1] for i in range(40)], (0.0, 1.0), 100)
    assert len(jobs) == len({(job, n) for n, job in enumerate(jobs)})
    greedy = [job for job in jobs if job.temperature == 0]
    assert len(greedy) == len(set(greedy))
    parts = batches(jobs, seed=3)
    generate = OwnTarget(target, max_tokens=3)
    whole = list(generate_rows(generate, parts, num_done=0, seed=9))
    rest = list(generate_rows(generate, parts, num_done=len(parts[0]), seed=9))
    assert rest == whole[1:]


# Training


def test_loss_counts_the_positions_after_the_prompt_alone(target: Any) -> None:
    """Against each row alone, without padding; the prompt's own positions are not learnt."""
    draft = build_tiny_model("llama", seed=4).requires_grad_(False)
    batch = Batch.of(ROWS[:3])
    total, count = 0.0, 0
    for row in ROWS[:3]:
        ids = torch.tensor([row.token_ids])
        p, q = (
            model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            for model in (target, draft)
        )
        for position in range(row.prompt_len - 1, len(row.token_ids) - 1):
            total += float((p[position].exp() * (p[position] - q[position])).sum())
            count += 1
    loss = distillation_loss(target, draft, batch, forward_kl)
    assert loss.item() == pytest.approx(total / count, rel=0.03), "bfloat16 against float32"


class _Stop:
    """Ends a training after some steps, as Ctrl-C does."""

    count = 1
    is_main = True

    def __init__(self, num_steps: int) -> None:
        self._left = num_steps

    def prepare(self, model: Any) -> Any:
        return model

    def agree(self, done: float) -> float:
        self._left -= 1
        return 1.0 if self._left < 0 else done


def test_a_resumed_training_is_the_uninterrupted_one(target: Any, tmp_path: Path) -> None:
    def trained(path: Path, *stops: int | None) -> tuple[Any, Position]:
        for stop in stops:
            draft = first_layers(target, 1).requires_grad_(True)
            position = train_draft(
                target,
                draft,
                lambda step: Batch.of([ROWS[i] for i in shuffled_batch(LENGTHS, 4, step, seed=0)]),
                loss=forward_kl,
                optimiser=Optimiser(draft, matrix_rate=4e-3, other_rate=1e-3),
                limits=Limits(num_steps=8, time_budget_s=1e9),
                checkpoint=Checkpoint(path),
                processes=None if stop is None else _Stop(stop),  # type: ignore[arg-type]
            )
        return draft, position

    whole, position = trained(tmp_path / "whole.pt", None)
    resumed, resumed_position = trained(tmp_path / "parts.pt", 3, 2, None)
    assert position.num_steps == resumed_position.num_steps == 8
    assert resumed_position.elapsed_s > 0
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(weight, resumed.state_dict()[name], msg=name)
    start = first_layers(target, 1)
    assert measure_acceptance(target, whole, ROWS).sampled > (
        measure_acceptance(target, start, ROWS).sampled
    )


def test_a_checkpoint_of_another_model_is_refused(target: Any, tmp_path: Path) -> None:
    def optimiser(model: Any) -> Optimiser:
        return Optimiser(model, matrix_rate=None, other_rate=1e-3)

    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(target, optimiser(target), Position(1, 1.0))
    other = build_tiny_model("llama", hidden_size=32)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt: not a checkpoint of this training"):
        checkpoint.load(other, optimiser(other))


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "gemma3", "gpt2"])
def test_first_layers_compute_what_they_do_in_the_target(family: str, tmp_path: Path) -> None:
    """The draft's last hidden state before its norm is the target's after as many layers."""
    from transformers import AutoModelForCausalLM

    make_tiny_model(family, tmp_path, num_layers=4)
    target = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    draft = first_layers(target, 2)
    ids = torch.arange(1, 20)[None]
    deep = target(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    norm = getattr(target.base_model, "norm", None) or target.base_model.ln_f
    shallow = draft(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(shallow[-1], norm(deep[2]))
    with pytest.raises(ConfigError, match=r"--from-layers: 4 is not possible .* allowed: 1 to 3"):
        first_layers(target, 4)


# Acceptance


def test_a_model_accepts_itself(target: Any) -> None:
    own = measure_acceptance(target, target, ROWS)
    assert own.sampled == pytest.approx(1.0, abs=1e-5)
    assert own.greedy == 1.0
    assert own.num_positions == sum(len(row.token_ids) - row.prompt_len for row in ROWS)
    assert Acceptance.from_dict(json.loads(json.dumps(own.to_dict()))) == own


def test_acceptance_is_that_of_each_row_alone(target: Any) -> None:
    draft = build_tiny_model("llama", seed=4).requires_grad_(False)
    sums = {0.0: [0.0, 0], 1.0: [0.0, 0]}
    for row in ROWS:
        ids = torch.tensor([row.token_ids[:-1]])
        p, q = (m(input_ids=ids, use_cache=False).logits[0].softmax(-1) for m in (target, draft))
        for position in range(row.prompt_len - 1, len(row.token_ids) - 1):
            agreed = (
                float(torch.minimum(p[position], q[position]).sum())
                if row.temperature
                else float(p[position].argmax() == q[position].argmax())
            )
            sums[row.temperature][0] += agreed
            sums[row.temperature][1] += 1
    measured = measure_acceptance(target, draft, ROWS)
    assert measured.sampled == pytest.approx(sums[1.0][0] / sums[1.0][1], abs=1e-5)
    assert measured.greedy == pytest.approx(sums[0.0][0] / sums[0.0][1], abs=1e-5)


def rates(sampled: list[float], greedy: list[float]) -> Acceptance:
    means = [sum(by_row) / len(by_row) for by_row in (sampled, greedy)]
    return Acceptance(means[0], means[1], 100, tuple(sampled), tuple(greedy))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (([0.6, 0.7], [0.5, 0.6]), None),
        (([0.5, 0.6], [0.5, 0.6]), None),  # equal is not worse
        (([0.4, 0.5], [0.4, 0.5]), "α at T = 1 fell from 0.5500 to 0.4500 and α greedy fell"),
        (([0.5, 0.6], [0.5, 0.59]), "α greedy fell from 0.5500 to 0.5450"),
        (([0.7, 0.8], [0.4, 0.5]), "α greedy fell from 0.5500 to 0.4500"),  # by far more than noise
        (([0.7, 0.8], [0.2, 0.89]), None),  # one row up, one down: noise, and the other rate rose
    ],
)
def test_a_draft_that_got_worse_is_found(
    after: tuple[list[float], list[float]], words: str | None
) -> None:
    verdict = worse(rates([0.5, 0.6], [0.5, 0.6]), rates(*after))
    assert (verdict is None) == (words is None)
    if words is not None:
        assert verdict is not None
        assert words in verdict
