"""Smoke tests of the `outrider bench` commands, the files they write, and Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import signal
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from outrider.redis.embedded import RedisServer
from outrider_bench.measuring.tasks import TaskTexts, edited
from tests import redis_fixture
from tests.cli.processes import here, interrupted, run
from tests.stack import running_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
redis_server = redis_fixture.redis_server

# Simulated tiers start in a third of the time of models.
SIMULATED = ("--simulate-target=step_ms=5", "--simulate-draft=step_ms=0.5,survival=0.8")


def bench(name: str, out: Path, *arguments: str, file: str | None = None) -> dict[str, Any]:
    """Runs a command with --quick, checks its plot and returns its JSON document."""
    ended = run("bench", name, "--quick", f"--out={out}", *arguments)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads((out / f"{file or name}.json").read_text("utf-8"))
    plot = xml.etree.ElementTree.parse(out / f"{file or name}.svg")
    assert plot.getroot().tag.endswith("svg")
    assert document["samples"]
    return document


def test_speed_variants_and_peer_generate_the_same_tokens(
    target: Path, draft: Path, tmp_path: Path
) -> None:
    """In float32, the outputs of Outrider and of the peer are equal token for token."""
    models = (f"--target={target}", f"--draft={draft}")
    document = bench("speed", tmp_path, *models, "--peer=huggingface", "--temperature=1")
    results = {result["name"]: result for result in document["results"]}
    assert {"plain", "sequential", "chain", "full", "γ 2", "HF plain, 1 core"} <= results.keys()
    assert {"plain T 1", "full T 1 coupled", "HF assisted default, 1 core"} <= results.keys()
    assert all(not result["num_different"] for result in document["results"])
    assert results["plain"]["speed_up"] == 1
    assert results["full"]["rounds"]["target_step_s"] > 0
    assert document["cores"]["target"] != document["cores"]["draft"]


def test_concurrency_runs_every_variant_with_every_number_of_streams(tmp_path: Path) -> None:
    document = bench("concurrency", tmp_path, "--gammas=2", *SIMULATED)
    rows = [(result["num_streams"], result["variant"]) for result in document["results"]]
    assert rows == [(num, variant) for num in (1, 2) for variant in ("plain", "full", "γ 2")]
    assert all(result["over_plain"] > 0 for result in document["results"])


@pytest.mark.parametrize("flags", [(), ("--alone",)], ids=["beside a draft tier", "alone"])
def test_sources_runs_every_task_with_every_source(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The simulated target writes the texts, whatever the source of the draft tokens."""
    document = bench("sources", tmp_path, *flags)
    sources = ("plain", "lookup") if flags else ("plain", "lookup", "model", "router")
    tasks = (*TaskTexts.TASKS, "all tasks")
    rows = [(result["task"], result["variant"]) for result in document["results"]]
    assert rows == [(task, source) for task in tasks for source in sources]
    assert all(not result["num_different"] for result in document["results"])
    quoting = next(r for r in document["results"] if r["variant"] == "lookup")
    assert quoting["lookup_alpha"] > 0.5


def test_an_edited_text_has_other_names_and_no_comments() -> None:
    text = "# first\ncount = size\n    # second\nprint(count, size, count)  # kept\n"
    assert edited(text) == "new_count = new_size\nprint(new_count, new_size, new_count)  # kept\n"


def test_delay_reports_the_loss_relative_to_no_delay(tmp_path: Path) -> None:
    document = bench("delay", tmp_path, *SIMULATED)
    rows = {(result["variant"], result["delay_ms"]): result for result in document["results"]}
    assert rows["full", 0]["lost"] == 0
    assert rows["ahead 1, fan 1", 5]["lost"] is not None


def test_swap_promotes_the_better_draft_and_rolls_the_bad_one_back(tmp_path: Path) -> None:
    """Real processes under load; the orchestrators decide. No output differs, none fails.

    tests/services/test_draft_swap.py swaps models.
    """
    flags = ("--quick", "--phase-s=1", "--max-tokens=16", "--gamma=3", f"--out={tmp_path}")
    simulated = ("--simulate-target=step_ms=20", "--simulate-draft=step_ms=0.5,survival=0.8")
    ended = run("bench", "swap", *flags, *simulated)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "swap.json").read_text("utf-8"))["results"]
    phases = {result["phase"]: result for result in results if "phase" in result}
    assert all(phase["num_generations"] for phase in phases.values())
    assert not any(phase["num_failed"] or phase["num_different"] for phase in phases.values())
    words = [result["decision"].split(":")[0].split()[1:] for result in results if "at_s" in result]
    assert ["promoted"] in words
    assert ["rolled", "back"] in words


def test_twin_compares_every_variant_with_its_simulation(
    target: Path, draft: Path, tmp_path: Path
) -> None:
    models = (f"--target={target}", f"--draft={draft}", "--max-tokens=24")
    ended = run("bench", "twin", "--quick", f"--out={tmp_path}", *models)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "twin.json").read_text("utf-8"))["results"]
    assert [row["variant"] for row in rows] == ["plain", "in turn, γ 4", "ahead, γ 4", "full"]
    assert all(row["simulated_tokens_per_s"] > 0 for row in rows)


def test_rounds_reports_cpu_and_memory_of_the_orchestrator(tmp_path: Path) -> None:
    document = bench("rounds", tmp_path, "--max-tokens=64")
    assert [result["num_streams"] for result in document["results"]] == [1, 4]
    for result in document["results"]:
        assert result["cpu_us_mean"] > 0
        assert result["memory_bytes"] > 1e6
        assert result["num_windows"] >= 1


def test_audit_looks_for_a_bias_and_reports_its_cost(tmp_path: Path) -> None:
    """Too few tokens for an alarm; re-runs are counted where generations are audited."""
    flags = ("--bias=0.1", "--most-tokens=64", *SIMULATED)
    ended = run("bench", "audit", "--quick", f"--out={tmp_path}", *flags)
    assert ended.returncode == 0, ended.stderr
    found, none, all_audited = json.loads((tmp_path / "audit.json").read_text("utf-8"))["results"]
    assert (found["test"], found["num_tokens"] >= 64) == (None, True)
    assert found["num_trials"] > 0
    assert (none["share"], none["num_reruns"], none["num_dropped"]) == (0, 0, 0)
    assert all_audited["share"] == 1


@pytest.mark.parametrize("over", ["context"])
def test_growth_has_a_result_for_every_point(over: str, tmp_path: Path) -> None:
    document = bench("growth", tmp_path, f"--over={over}", *SIMULATED, file=f"growth-{over}")
    assert len({result["value"] for result in document["results"]}) == 2
    assert all(result["tokens_per_s"] > 0 for result in document["results"])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("growth", "--over=vocabulary", "--target=here"), "--over vocabulary"),
        (("growth", "--points=x"), "--points"),
        (("speed", "--draft=none", SIMULATED[0]), "--draft"),
        (("swap", SIMULATED[0]), "--simulate-target, --simulate-draft: one is given"),
        (("swap", "--new=here", *SIMULATED), "--new: cannot be combined with --simulate-draft"),
        (("speed", "--peer=huggingface", "--inflate=20M"), "--peer"),
    ],
)
def test_invalid_options_are_rejected_with_the_flag_name(
    arguments: tuple[str, ...], flag: str, tmp_path: Path
) -> None:
    name, *rest = arguments
    ended = here("bench", name, "--quick", f"--out={tmp_path}", *rest)
    assert ended.returncode == 2, ended.stderr
    assert flag in ended.stderr


@pytest.mark.parametrize(
    ("words", "until", "titles"),
    [
        (
            ("speed", "--max-tokens=4", "--explain-gamma"),
            "14/",
            ("tokens/s of one stream", "◀ chosen", "draft step"),
        ),
        (
            ("concurrency", "--streams=1,2", "--max-tokens=4"),
            "8/",
            ("total tokens/s of concurrent streams",),
        ),
        (("delay", "--delays=0", "--ahead=1x1", "--max-tokens=4"), "5/", ("delay",)),
        (("growth", "--points=8", "--max-tokens=4"), "5/", ("tokens of context",)),
        (("rounds", "--streams=2", "--max-tokens=400"), "4/", ("the orchestrator",)),
    ],
)
def test_ctrl_c_reports_the_results_so_far(
    words: tuple[str, ...], until: str, titles: tuple[str, ...], tmp_path: Path
) -> None:
    """The expected duration is printed first; a signal ends the measurement, not the report."""
    flags = ("--repetitions=500", f"--out={tmp_path}")
    ended = interrupted("bench", *words, *flags, *SIMULATED, at=until)
    output = ended.stdout
    assert ended.returncode == 128 + signal.SIGINT, output
    assert "Ctrl-C reports the results so far" in output
    assert "the remaining steps take about" in output
    assert " left)" in output
    assert f"stopped in step {until.rstrip('/')} of" in output
    assert [title for title in titles if title not in output] == []
    assert "Traceback" not in output
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text("utf-8"))
    assert written["is_cut"]
    assert written["samples"]
    assert written["goals"] == []


def test_ctrl_c_before_the_first_result_reports_that_nothing_was_measured(tmp_path: Path) -> None:
    ended = interrupted("bench", "speed", f"--out={tmp_path}", *SIMULATED, at="1/")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "stopped in step 1 of" in ended.stdout
    assert "nothing has been measured" in ended.stdout


def test_ctrl_c_in_attacks_reports_the_completed_phases(tmp_path: Path) -> None:
    """The duration is known beforehand: each phase lasts --seconds."""
    flags = ("--attacks=unread", "--clients=5", "--seconds=1", f"--out={tmp_path}")
    ended = interrupted("bench", "attacks", *flags, at="2/3 ")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "3 steps, about " in ended.stdout
    written = json.loads((tmp_path / "attacks.json").read_text("utf-8"))
    assert [(one["attack"], one["name"]) for one in written["results"]] == [("unread", "before")]


def test_ctrl_c_in_explain_gamma_explains_the_warm_up() -> None:
    simulated = ("--simulate-target=step_ms=50", "--simulate-draft=step_ms=1,survival=0.8")
    ended = interrupted("bench", "explain-gamma", "--max-tokens=2000", *simulated, at="2/2 ")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "2 steps, " in ended.stdout
    assert "the remaining steps take about" in ended.stdout
    assert "◀ chosen" in ended.stdout
    assert "this is the choice of the warm-up output" in ended.stdout


async def test_ctrl_c_in_wire_reports_the_results_so_far(
    target: Path, draft: Path, redis_server: RedisServer
) -> None:
    """Of a running system; tests/bench/commands/test_measuring.py has one that it starts."""
    async with running_stack(target, draft, redis_server.url, tokenizer=str(target)) as stack:
        flags = (f"--endpoint={stack.endpoint}", "--runs=1", "--max-tokens=8", "--json")
        ended = await asyncio.to_thread(interrupted, "bench", "wire", *flags, at="3/6 ")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "6 steps, " in ended.stdout
    assert "the remaining steps take about" in ended.stdout
    assert "stopped in step 3 of 6" in ended.stdout
    document = json.loads(ended.stdout.splitlines()[-1])
    assert document["is_cut"]
    assert len(document["results"]) == 2


def test_ctrl_c_in_demo_compares_the_outputs_so_far() -> None:
    flags = ("--inflate=0", "--rounds=500", "--seconds=500", "--max-tokens=32")
    ended = interrupted("demo", *flags, at="about ")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "stopped: compares the outputs so far" in ended.stdout
    assert "sampled at T = 0.7, seed 1" in ended.stdout
    for way in ("greedy", "T = 0.7"):
        assert f"plain, {way}" in ended.stdout
        assert f"speculative, {way}" in ended.stdout
    assert "identical token for token" in ended.stdout


def test_ctrl_c_in_pair_reports_the_search(tmp_path: Path) -> None:
    """With this vocabulary a measurement takes about two seconds; no pair is written."""
    flags = ("--size=tiny", "--vocab-size=65536")
    ended = interrupted("bench", "pair", str(tmp_path / "tiny"), *flags, at="measurement 1:")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "takes seconds; 4 to 32 measurements" in ended.stdout
    assert " left\n" in ended.stdout
    assert "stopped after " in ended.stdout
    assert "to skip the search: --epsilon " in ended.stdout
    assert not (tmp_path / "tiny" / "pair.json").exists()
