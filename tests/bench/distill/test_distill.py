"""`outrider distill` as a process, and its result in the services."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.errors import ConfigError
from outrider.redis.embedded import RedisServer
from outrider.tokenizer import Tokenizer
from outrider_bench.distill.generate import Job, OwnTarget, RunningService
from outrider_bench.distill.models import load_target
from outrider_bench.distill.run import REPORT, distill
from outrider_bench.distill.settings import DistillSettings
from outrider_bench.quickstart.architecture import ModelShape
from outrider_bench.quickstart.train import train
from tests import redis_fixture
from tests.bench.quickstart.small_training import CORPUS, small
from tests.cli.processes import ROOT, TIMEOUT_S, command, environment, interrupted
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import running_stack
from tests.tiny_models import make_tiny_draft, make_tiny_model

redis_server = redis_fixture.redis_server

WORDS = "\n".join(CORPUS.train).split()
PROMPTS = sorted({" ".join(WORDS[i : i + 3]) for i in range(len(WORDS) - 3)})
NUM_HELD_OUT = 6
# A high rate: small models learn in a few steps.
QUICK = ("--samples=200", "--max-tokens=24", "--batch=20", "--learning-rate=0.003", "--device=cpu")


def quick(target: Path, prompts: Path, out: Path, **changes: Any) -> DistillSettings:
    """The settings of the command with --from-layers=1 and QUICK."""
    settings = DistillSettings(
        target=str(target), from_layers=1, prompts=prompts, out=out, samples=200,
        max_tokens=24, batch=20, learning_rate=3e-3, device="cpu",
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for some seconds: what a random model says cannot be learnt."""
    directory = tmp_path_factory.mktemp("pair")
    config = dataclasses.replace(
        small(num_target_steps=150, num_draft_steps=1),
        windows=((8, 64),),
        target_shape=ModelShape(48, 3, 2, 1, 96, head_dim=24),
    )
    train(directory, config, corpus=CORPUS)
    return directory / "target"


@pytest.fixture(scope="module")
def token_ids(target: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(str(target))
    assert tokenizer is not None
    return [tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A draft from the target's first layer, trained as the command does, and what it shows."""
    out = tmp_path_factory.mktemp("drafts") / "draft"
    lines: list[str] = []
    assert distill(quick(target, prompts, out, steps=40), lines.append) is not None
    return out, "\n".join(lines)


@pytest.mark.slow
def test_acceptance_rises_on_held_out_prompts(
    made: tuple[Path, str],
) -> None:
    out, shown = made
    num_prompts = len(PROMPTS)
    split = f"{num_prompts - NUM_HELD_OUT} to train on, {NUM_HELD_OUT} held out"
    assert f"{num_prompts} prompts: {split}" in shown
    report = json.loads((out / REPORT).read_text("utf-8"))
    assert report["num_steps"] == 40
    assert report["after"]["sampled"] > report["before"]["sampled"] + 0.1
    assert report["after"]["greedy"] > report["before"]["greedy"] + 0.1
    for when in ("before", "after"):
        rates = report[when]
        line = f"α {rates['sampled']:.3f} at T = 1, {rates['greedy']:.3f} greedy"
        assert line in shown


@pytest.mark.slow
def test_the_draft_is_an_ordinary_directory(made: tuple[Path, str], target: Path) -> None:
    out, _ = made
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 1
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (target / name).read_bytes()
    assert not (out / "distillation").exists()


@pytest.mark.slow
async def test_the_services_serve_the_draft(
    made: tuple[Path, str],
    target: Path,
    token_ids: list[list[int]],
    redis_server: RedisServer,
) -> None:
    """Greedy output is the same with and without it, and some of its tokens are accepted."""
    out, _ = made
    sampling = {"temperature": 0.0, "max_tokens": 24}
    async with running_stack(target, out, redis_server.url) as stack:
        drafted = await stack.generate(token_ids[0], sampling=sampling, gamma=3)
        plain = await stack.generate(token_ids[0], sampling=sampling, gamma=0)
    assert drafted.token_ids == plain.token_ids
    assert drafted.speculation.num_accepted_tokens > 0


async def test_rows_of_a_running_service_are_the_targets_own(
    target: Path, token_ids: list[list[int]], redis_server: RedisServer
) -> None:
    jobs = [Job(tuple(ids), 0.0) for ids in token_ids[:6]]
    async with running_stack(target, None, redis_server.url) as stack:
        service = RunningService(stack.endpoint, None, max_tokens=10)
        rows = await asyncio.to_thread(service, jobs, 0)
    own = OwnTarget(load_target(str(target), torch.device("cpu")), max_tokens=10)
    assert rows == own(jobs, 0)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft"
    arguments = ("distill", str(target), "--from-layers=1", f"--prompts={prompts}", f"--out={out}",
                 "--checkpoint-s=0", *QUICK)  # fmt: skip
    with subprocess.Popen(
        command(*arguments, "--steps=1000000"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step 50"):
                    break
        finally:
            process.kill()
    first = "".join(lines)
    assert "\nrows 1" in first
    assert not (out / "config.json").exists()
    lines.clear()
    report = distill(quick(target, prompts, out, steps=60, checkpoint_s=0.0), lines.append)
    assert report is not None
    assert report.num_steps == 60
    shown = "\n".join(lines)
    assert "\nrows " not in shown
    assert "going on from the checkpoint" in shown
    assert "step 0," not in shown
    assert [line for line in first.splitlines() if line.startswith("before: ")] == [
        line for line in lines if line.startswith("before: ")
    ]
    assert json.loads((out / REPORT).read_text("utf-8"))["num_steps"] == 60


@pytest.mark.slow
def test_ctrl_c_measures_the_draft_and_writes_nothing(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft"
    arguments = ("distill", str(target), "--from-layers=1", f"--prompts={prompts}", f"--out={out}",
                 *QUICK)  # fmt: skip
    done = interrupted(*arguments, at="step 25")
    assert done.returncode == 128 + signal.SIGINT, done.stdout
    assert "after:  α " in done.stdout
    assert "no draft was written, the same command goes on" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (out / "config.json").exists()
    settings = quick(target, prompts, out, steps=20)
    with pytest.raises(ConfigError, match="has an unfinished distillation with another --loss;"):
        distill(dataclasses.replace(settings, loss="tv"))
    report = distill(settings)  # fewer steps than it has taken: measures and writes
    assert report is not None
    assert report.num_steps >= 25
    assert (out / "config.json").exists()


def test_a_draft_that_got_worse_is_not_written(target: Path, prompts: Path, tmp_path: Path) -> None:
    """A draft that agrees almost always, trained at a rate that destroys it."""
    draft, out = tmp_path / "good", tmp_path / "out"
    make_tiny_draft(target, draft)
    shutil.copyfile(target / "tokenizer.json", draft / "tokenizer.json")
    lines: list[str] = []
    report = distill(
        DistillSettings(
            target=str(target), draft=str(draft), prompts=prompts, out=out, steps=45, samples=60,
            max_tokens=8, batch=20, learning_rate=1.0, device="cpu",
        ),
        lines.append,
    )  # fmt: skip
    assert report is not None
    assert report.after.sampled < report.before.sampled
    assert report.refused is not None
    assert "no draft was written: α at T = 1 fell from" in lines[-1]
    assert not (out / "config.json").exists()


async def test_recorded_traffic_is_trained_on(
    target: Path, token_ids: list[list[int]], redis_server: RedisServer, tmp_path: Path
) -> None:
    """Recorded by the orchestrator; nothing is generated."""
    traffic, out = tmp_path / "traffic", tmp_path / "out"
    recording = {"traffic_dir": str(traffic), "traffic_share": 1.0}
    async with running_stack(target, None, redis_server.url, **recording) as stack:
        sampling = {"temperature": 1.0, "max_tokens": 24}
        for _ in range(3):
            async with asyncio.TaskGroup() as tasks:
                for ids in token_ids:
                    tasks.create_task(stack.generate(ids, sampling=sampling))
    settings = DistillSettings(
        target=str(target), from_layers=1, traffic=traffic, out=out, steps=30, batch=20,
        learning_rate=3e-3, device="cpu", loss="lk-lambda",
    )  # fmt: skip
    report = distill(settings)
    assert report is not None
    assert report.num_rows > 100
    assert report.after.sampled > report.before.sampled + 0.1
    assert report.after.greedy > report.before.greedy
    assert (out / "config.json").exists()
    with pytest.raises(ConfigError, match=r"--out: .* already has a model"):
        distill(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft": "x"}, "--draft, --from-layers: both are given; give one"),
        ({"from_layers": None}, "--draft, --from-layers: neither is given; give one"),
        ({"prompts": None}, "--prompts, --traffic: neither is given; give one"),
        ({"prompts": Path("/absent")}, "--prompts: /absent does not exist"),
        ({"loss": "mse"}, "--loss: 'mse' is unknown; allowed: kl, reverse-kl, tv, lk-alpha, "),
        ({"minutes": 0.0}, "--minutes: 0 is too small; above 0"),
        ({"learning_rate": 0.0}, "--learning-rate: 0 is too small; above 0"),
    ],
)
def test_wrong_flags_are_named(
    changes: dict[str, Any], words: str, target: Path, prompts: Path, tmp_path: Path
) -> None:
    right: dict[str, Any] = {
        "target": str(target), "from_layers": 1, "prompts": prompts, "out": tmp_path / "out",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        distill(DistillSettings(**{**right, **changes}))
    assert str(caught.value).startswith(words)
    assert not (tmp_path / "out").exists()


def test_a_draft_with_another_tokenizer_is_refused(
    target: Path, prompts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_tiny_model("llama", other, vocab_size=300)
    write_tokenizer(other, corpus="entirely different words")
    settings = DistillSettings(
        target=str(target), draft=str(other), prompts=prompts, out=tmp_path / "out", device="cpu"
    )
    with pytest.raises(ConfigError, match=r"--draft: the tokenizer of .* is not that of"):
        distill(settings)


def test_rows_beyond_the_context_are_refused(target: Path, prompts: Path, tmp_path: Path) -> None:
    settings = DistillSettings(
        target=str(target), from_layers=1, prompts=prompts, out=tmp_path / "out", device="cpu",
        max_prompt_tokens=2000, max_tokens=100,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"2100 in all exceed the context of .* \(2048\)"):
        distill(settings)


@pytest.mark.slow
def test_two_processes_train_one_draft(target: Path, prompts: Path, tmp_path: Path) -> None:
    """Started by accelerate, on CPUs; one of them reports and writes."""
    out = tmp_path / "draft"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2",
                "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--module",
                "outrider"]  # fmt: skip
    done = subprocess.run(
        [*launcher, "distill", str(target), "--from-layers=1", f"--prompts={prompts}",
         f"--out={out}", "--steps=30", *QUICK],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("before: ") == 1
    assert done.stdout.count(f"wrote {out}") == 1
    report = json.loads((out / REPORT).read_text("utf-8"))
    assert report["after"]["sampled"] > report["before"]["sampled"]
