"""`outrider bench scaling`: its trials, its arithmetic, how it sees tiers work, and a quick run."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.sampling.formulas import mean_acceptance_length, speedup_sequential
from outrider.settings.simulation import Simulation
from outrider_bench.commands.busy import BusyWatch
from outrider_bench.commands.scaling import ScalingOptions, trials
from outrider_bench.commands.trials import Trial, expected_gain, simulated_tiers
from tests.cli.processes import run

PASS_MS = 80.0
GAMMAS = range(1, 17)


def gain(ratio: float, alpha: float, *, is_hidden: bool, **fields: float) -> float:
    told = {"round_trip_ms": 0.0, "num_sessions": 1, "num_drafts": 1, **fields}
    trial = Trial(
        ratio, alpha, told["round_trip_ms"], int(told["num_sessions"]), int(told["num_drafts"])
    )
    return expected_gain(PASS_MS, trial, is_hidden=is_hidden)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9])
def test_one_session_is_the_formula_of_the_field(ratio: float, alpha: float) -> None:
    """In turn as Leviathan et al.; hidden with a step more, for the guess that a block starts from.

    Without a gain it is plain decoding.
    """
    in_turn = max(speedup_sequential(alpha, gamma, ratio) for gamma in GAMMAS)
    assert gain(ratio, alpha, is_hidden=False) == pytest.approx(max(1.0, in_turn))
    hidden = max(mean_acceptance_length(alpha, g) / max(1.0, (g + 1) * ratio) for g in GAMMAS)
    assert gain(ratio, alpha, is_hidden=True) == pytest.approx(max(1.0, hidden))


def test_what_arithmetic_says_of_load() -> None:
    """A round trip costs who drafts in turn; replicas help where rows do not fit one of them."""
    assert gain(0.1, 0.8, is_hidden=False, round_trip_ms=40.0) < gain(0.1, 0.8, is_hidden=False)
    assert gain(0.1, 0.8, is_hidden=True, round_trip_ms=40.0) == gain(0.1, 0.8, is_hidden=True)
    few, many = {"num_sessions": 8}, {"num_sessions": 32}
    one = gain(0.4, 0.8, is_hidden=True, **many)
    assert gain(0.4, 0.8, is_hidden=True, num_drafts=4, **many) > one
    alone = gain(0.4, 0.8, is_hidden=True, **few)
    assert gain(0.4, 0.8, is_hidden=True, num_drafts=4, **few) == alone > one
    # The target itself is full: no draft of any speed helps.
    assert gain(0.0, 0.5, is_hidden=True, num_sessions=256) == 1.0


def test_simulated_tiers_share_their_truth() -> None:
    """And say so in lines that the services read."""
    target, draft = simulated_tiers(PASS_MS, 0.1, 0.7)
    assert Simulation.parse(str(target), is_draft=False) == target
    assert Simulation.parse(str(draft)) == draft
    assert (target.vocab_size, target.seed) == (draft.vocab_size, draft.seed)
    assert draft.survival == (0.7,)
    assert draft.costs.pass_s(1, 1) == pytest.approx(0.1 * target.costs.pass_s(1, 1))


def test_trials_begin_with_plain_decoding_and_have_no_replica_too_many() -> None:
    given = ScalingOptions(sessions="1,3", drafts="1,2,3", round_trips="0,40")
    listed = trials(given, 0.1, 0.8)
    assert [(t.num_sessions, t.num_drafts) for t in listed[:2]] == [(1, 0), (3, 0)]
    assert Counter(t.num_drafts for t in listed) == {0: 2, 1: 4, 2: 2, 3: 2}
    assert len(set(listed)) == len(listed)


async def test_a_sleeping_process_is_busy() -> None:
    """Asleep all the time, and never: what simulated passes are, and what waits for work is."""
    lines = {"pass": "import time; time.sleep(1000)", "idle": "import sys; sys.stdin.read()"}
    children = {
        name: await asyncio.create_subprocess_exec(
            sys.executable, "-c", line, stdin=asyncio.subprocess.PIPE
        )
        for name, line in lines.items()
    }
    try:
        async with BusyWatch({name: child.pid for name, child in children.items()}) as watch:
            while not watch.has_seen("pass"):  # noqa: ASYNC110 (it starts when it starts)
                await asyncio.sleep(0.01)
            begin = time.monotonic()
            await asyncio.sleep(0.1)
        end = time.monotonic()
        assert watch.share("pass", begin, end) == 1.0
        assert watch.share("idle", begin, end) == 0.0
        assert watch.has_looked(begin, end)
        assert not watch.has_looked(end + 1, end + 2)
        with pytest.raises(ConfigError, match="whether the pass is busy"):
            watch.share("pass", end + 1, end + 2)
        async with BusyWatch({"idle": children["idle"].pid}) as watch:
            await asyncio.sleep(0.1)
        with pytest.raises(ConfigError, match="whether the idle is busy"):
            watch.share("idle", end, time.monotonic())
    finally:
        for child in children.values():
            child.kill()
            await child.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--target=m", "--target: the tiers are simulated"),
        ("--simulate-draft=step_ms=1", "--simulate-draft: the tiers are simulated"),
        ("--drafts=0,1", "--drafts: '0,1': 1 to 4"),
        ("--drafts=5", "--drafts: '5': 1 to 4"),
        ("--sessions=0", "--sessions: '0': 1 or more"),
        ("--alphas=1.5", "--alphas: '1.5': 0 to 1"),
        ("--ratios=x", "--ratios: 'x'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flag: str, named: str, tmp_path: Path) -> None:
    ended = run("bench", "scaling", flag, f"--out={tmp_path}")
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_has_every_point(tmp_path: Path) -> None:
    """One target, two orchestrators on it with a draft each; the files are whole."""
    # Long enough that the target is seen at work, however seldom this process may look.
    flags = ("--quick", "--pass-ms=25", "--max-tokens=64", f"--out={tmp_path}")
    ended = run("bench", "scaling", *flags)
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "scaling.json").read_text("utf-8"))
    results = {(r["num_sessions"], r["num_drafts"]): r for r in document["results"]}
    assert list(results) == [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]
    for (num_sessions, num_drafts), result in results.items():
        assert result["tokens_per_s"] > 0
        assert 0 < result["target_busy"] <= 1
        # How busy a draft was seen depends on the γ that a few rounds chose.
        assert 0 <= (result["draft_busy"] or 0) <= (1 if num_drafts else 0)
        assert 0 < result["rows_per_pass"] <= num_sessions + 1
    samples = [s for s in document["samples"] if s["num_drafts"] == 2]
    assert [sorted(sample["busy"]) for sample in samples] == 2 * [["draft 0", "draft 1", "target"]]
    assert document["models"]["target"]["architecture"] == "simulated"
    plot = xml.etree.ElementTree.parse(tmp_path / "scaling.svg")
    assert plot.getroot().tag.endswith("svg")
