"""`outrider bench` as users run it: every command's smoke test, and the files it leaves."""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import interrupted, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# Where it is not models that matter: their programs start in a third of the time.
SIMULATED = ("--simulate-target=step_ms=5", "--simulate-draft=step_ms=0.5,survival=0.8")


def bench(name: str, out: Path, *arguments: str, file: str | None = None) -> dict[str, Any]:
    """The document of a quick run, its plot checked to be one."""
    ended = run("bench", name, "--quick", f"--out={out}", *arguments)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads((out / f"{file or name}.json").read_text("utf-8"))
    plot = xml.etree.ElementTree.parse(out / f"{file or name}.svg")
    assert plot.getroot().tag.endswith("svg")
    assert document["samples"]
    return document


def test_speed_compares_ways_of_the_same_output(target: Path, draft: Path, tmp_path: Path) -> None:
    """Ours and the peer's, token for token; in float32."""
    models = (f"--target={target}", f"--draft={draft}")
    told = bench("speed", tmp_path, *models, "--peer=huggingface", "--temperature=1")
    results = {result["name"]: result for result in told["results"]}
    assert {"plain", "sequential", "chain", "full", "γ 2", "HF plain, 1 core"} <= results.keys()
    assert {"plain T 1", "full T 1 coupled", "HF assisted default, 1 core"} <= results.keys()
    assert all(not result["num_different"] for result in told["results"])
    assert results["plain"]["speed_up"] == 1
    assert results["full"]["rounds"]["target_step_s"] > 0
    assert told["cores"]["target"] != told["cores"]["draft"]


def test_speed_explains_the_choice_of_gamma(tmp_path: Path) -> None:
    flags = ("--quick", "--gammas=", "--explain-gamma", f"--out={tmp_path}")
    ended = run("bench", "speed", *flags, *SIMULATED)
    assert ended.returncode == 0, ended.stderr
    assert "chosen" in ended.stdout
    assert "draft step" in ended.stdout


def test_concurrency_runs_every_number_of_streams_each_way(tmp_path: Path) -> None:
    told = bench("concurrency", tmp_path, "--gammas=2", *SIMULATED)
    ways = [(result["num_streams"], result["variant"]) for result in told["results"]]
    assert ways == [(num, way) for num in (1, 2) for way in ("plain", "full", "γ 2")]
    assert all(result["over_plain"] > 0 for result in told["results"])


def test_delay_compares_with_none(tmp_path: Path) -> None:
    told = bench("delay", tmp_path, *SIMULATED)
    rows = {(result["variant"], result["delay_ms"]): result for result in told["results"]}
    assert rows["full", 0]["lost"] == 0
    assert rows["ahead 1, fan 1", 5]["lost"] is not None


def test_a_twin_is_told_what_the_pair_did(target: Path, draft: Path, tmp_path: Path) -> None:
    models = (f"--target={target}", f"--draft={draft}", "--max-tokens=24")
    ended = run("bench", "twin", "--quick", f"--out={tmp_path}", *models)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "twin.json").read_text("utf-8"))["results"]
    assert [row["variant"] for row in rows] == ["plain", "in turn, γ 4", "ahead, γ 4", "full"]
    assert all(row["simulated_tokens_per_s"] > 0 for row in rows)


def test_rounds_reads_the_orchestrators_own_time(tmp_path: Path) -> None:
    told = bench("rounds", tmp_path, "--max-tokens=64")
    assert [result["num_streams"] for result in told["results"]] == [1, 4]
    for result in told["results"]:
        assert result["cpu_us_mean"] > 0
        assert result["memory_bytes"] > 1e6
        assert result["num_windows"] >= 1


@pytest.mark.parametrize("over", ["context"])
def test_growth(over: str, tmp_path: Path) -> None:
    """Two points of each."""
    told = bench("growth", tmp_path, f"--over={over}", *SIMULATED, file=f"growth-{over}")
    assert len({result["value"] for result in told["results"]}) == 2
    assert all(result["tokens_per_s"] > 0 for result in told["results"])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("growth", "--over=vocabulary", "--target=here"), "--over vocabulary"),
        (("growth", "--points=x"), "--points"),
        (("speed", "--draft=none", SIMULATED[0]), "--draft"),
        (("speed", "--peer=huggingface", "--inflate=20M"), "--peer"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    arguments: tuple[str, ...], flag: str, tmp_path: Path
) -> None:
    name, *rest = arguments
    ended = run("bench", name, "--quick", f"--out={tmp_path}", *rest)
    assert ended.returncode == 2, ended.stderr
    assert flag in ended.stderr


@pytest.mark.parametrize(
    ("words", "until", "title"),
    [
        (("speed", "--max-tokens=4"), "14/", "one stream"),
        (("speed", "--max-tokens=4", "--explain-gamma"), "14/", "◀ chosen"),
        (("concurrency", "--streams=1,2", "--max-tokens=4"), "8/", "many streams"),
        (("delay", "--delays=0", "--ahead=1x1", "--max-tokens=4"), "5/", "delay"),
        (("growth", "--points=8", "--max-tokens=4"), "5/", "tokens of context"),
        (("rounds", "--streams=2", "--max-tokens=400"), "4/", "the orchestrator"),
        (("speed", "--max-tokens=4"), "8/", "one stream"),
    ],
)
def test_ctrl_c_reports_what_there_is(
    words: tuple[str, ...], until: str, title: str, tmp_path: Path
) -> None:
    """The time is said first; a signal ends the measuring, not the report."""
    flags = ("--repetitions=500", f"--out={tmp_path}")
    ended = interrupted("bench", *words, *flags, *SIMULATED, at=until)
    said = ended.stdout
    assert ended.returncode == 128 + signal.SIGINT, said
    assert "Ctrl-C reports the results so far" in said
    assert "the remaining steps take about" in said
    assert " left)" in said
    assert f"stopped in step {until.rstrip('/')} of" in said
    assert title in said
    assert "Traceback" not in said
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text("utf-8"))
    assert written["is_cut"]
    assert written["samples"]
    assert written["goals"] == []


def test_ctrl_c_before_the_first_result_says_so(tmp_path: Path) -> None:
    ended = interrupted("bench", "speed", f"--out={tmp_path}", *SIMULATED, at="1/")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "stopped in step 1 of" in ended.stdout
    assert "nothing has been measured" in ended.stdout


def test_ctrl_c_in_attacks_keeps_the_phases_before(tmp_path: Path) -> None:
    """The time is known beforehand: phases last as long as is asked."""
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
    assert "this is the warm-up's choice" in ended.stdout


def test_ctrl_c_in_wire_reports_what_there_is() -> None:
    ended = interrupted("bench", "wire", "--runs=1", "--max-tokens=8", "--json", at="3/6 ")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "6 steps, " in ended.stdout
    assert "the remaining steps take about" in ended.stdout
    assert "stopped in step 3 of 6" in ended.stdout
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["is_cut"]
    assert len(told["results"]) == 2


def test_ctrl_c_in_a_demo_compares_what_there_is() -> None:
    flags = ("--inflate=0", "--rounds=500", "--seconds=500", "--max-tokens=32")
    ended = interrupted("demo", *flags, at="about 500 s more")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "stopped: this compares the outputs before" in ended.stdout
    assert "speculative" in ended.stdout
    assert "identical token for token" in ended.stdout


def test_ctrl_c_in_making_a_pair_reports_the_search(tmp_path: Path) -> None:
    """Of p1 a measurement takes seconds; no whole pair is there."""
    ended = interrupted("bench", "pair", str(tmp_path / "p1"), at="measurement 1:")
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "takes minutes; 4 to 32 measurements" in ended.stdout
    assert " left\n" in ended.stdout
    assert "stopped after " in ended.stdout
    assert "without a search: --epsilon " in ended.stdout
    assert not (tmp_path / "p1" / "pair.json").exists()
