"""`outrider bench scaling`: trials, expected gains, utilization of tiers, and a quick run."""

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
from tests.cli.processes import here, run

PASS_MS = 80.0
GAMMAS = range(1, 17)


def gain(ratio: float, alpha: float, *, is_hidden: bool, **fields: float) -> float:
    values = {"round_trip_ms": 0.0, "num_sessions": 1, "num_drafts": 1, **fields}
    trial = Trial(
        ratio,
        alpha,
        values["round_trip_ms"],
        int(values["num_sessions"]),
        int(values["num_drafts"]),
    )
    return expected_gain(PASS_MS, trial, is_hidden=is_hidden)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9])
def test_gain_of_one_session_is_the_published_formula(ratio: float, alpha: float) -> None:
    """Sequential as in Leviathan et al.; hidden with one more step, for the guessed first token.

    Without a gain it is plain decoding.
    """
    in_turn = max(speedup_sequential(alpha, gamma, ratio) for gamma in GAMMAS)
    assert gain(ratio, alpha, is_hidden=False) == pytest.approx(max(1.0, in_turn))
    hidden = max(mean_acceptance_length(alpha, g) / max(1.0, (g + 1) * ratio) for g in GAMMAS)
    assert gain(ratio, alpha, is_hidden=True) == pytest.approx(max(1.0, hidden))


def test_gain_depends_on_round_trip_and_load() -> None:
    """A round trip costs only sequential drafting; replicas help if one draft is overloaded."""
    assert gain(0.1, 0.8, is_hidden=False, round_trip_ms=40.0) < gain(0.1, 0.8, is_hidden=False)
    assert gain(0.1, 0.8, is_hidden=True, round_trip_ms=40.0) == gain(0.1, 0.8, is_hidden=True)
    few, many = {"num_sessions": 8}, {"num_sessions": 32}
    one = gain(0.4, 0.8, is_hidden=True, **many)
    assert gain(0.4, 0.8, is_hidden=True, num_drafts=4, **many) > one
    alone = gain(0.4, 0.8, is_hidden=True, **few)
    assert gain(0.4, 0.8, is_hidden=True, num_drafts=4, **few) == alone > one
    # The target itself is full: no draft of any speed helps.
    assert gain(0.0, 0.5, is_hidden=True, num_sessions=256) == 1.0


def test_simulated_tiers_share_vocabulary_and_seed() -> None:
    """The services parse their text form."""
    target, draft = simulated_tiers(PASS_MS, 0.1, 0.7)
    assert Simulation.parse(str(target), is_draft=False) == target
    assert Simulation.parse(str(draft)) == draft
    assert (target.vocab_size, target.seed) == (draft.vocab_size, draft.seed)
    assert draft.survival == (0.7,)
    assert draft.costs.pass_s(1, 1) == pytest.approx(0.1 * target.costs.pass_s(1, 1))


def test_trials_begin_with_plain_decoding_and_have_at_most_one_replica_per_session() -> None:
    options = ScalingOptions(sessions="1,3", drafts="1,2,3", round_trips="0,40")
    listed = trials(options, 0.1, 0.8)
    assert [(t.num_sessions, t.num_drafts) for t in listed[:2]] == [(1, 0), (3, 0)]
    assert Counter(t.num_drafts for t in listed) == {0: 2, 1: 4, 2: 2, 3: 2}
    assert len(set(listed)) == len(listed)


async def test_busy_watch_counts_a_sleeping_process_as_busy() -> None:
    """A simulated pass sleeps; an idle tier waits without sleeping."""
    lines = {"pass": "import time; time.sleep(1000)", "idle": "import sys; sys.stdin.read()"}
    children = {
        name: await asyncio.create_subprocess_exec(
            sys.executable, "-c", line, stdin=asyncio.subprocess.PIPE
        )
        for name, line in lines.items()
    }
    try:
        async with BusyWatch({name: child.pid for name, child in children.items()}) as watch:
            while not watch.has_seen("pass"):  # noqa: ASYNC110 (no event reports the start)
                await asyncio.sleep(0.01)
            begin = time.monotonic()
            await asyncio.sleep(0.1)
        end = time.monotonic()
        assert watch.share("pass", begin, end) == 1.0
        assert watch.share("idle", begin, end) == 0.0
        assert watch.has_samples(begin, end)
        assert not watch.has_samples(end + 1, end + 2)
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


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--target=m", "--target: not allowed: this command simulates"),
        ("--simulate-draft=step_ms=1", "--simulate-draft: not allowed: this command simulates"),
        ("--drafts=0,1", "--drafts: '0,1' is out of range: 1 to 4"),
        ("--drafts=5", "--drafts: '5' is out of range: 1 to 4"),
        ("--sessions=0", "--sessions: '0' is out of range: at least 1"),
        ("--alphas=1.5", "--alphas: '1.5' is out of range: 0 to 1"),
        ("--ratios=x", "--ratios: 'x'"),
    ],
)
def test_invalid_options_are_rejected_with_the_flag_name(
    flag: str, named: str, tmp_path: Path
) -> None:
    ended = here("bench", "scaling", flag, f"--out={tmp_path}")
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_run_has_a_result_for_every_point(tmp_path: Path) -> None:
    """One target, two orchestrators with one draft each; JSON and plot are complete."""
    # Long enough that the target is seen in a pass even with few samples.
    flags = ("--quick", "--pass-ms=25", "--max-tokens=64", f"--out={tmp_path}")
    ended = run("bench", "scaling", *flags)
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "scaling.json").read_text("utf-8"))
    results = {(r["num_sessions"], r["num_drafts"]): r for r in document["results"]}
    assert list(results) == [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]
    for (num_sessions, num_drafts), result in results.items():
        assert result["tokens_per_s"] > 0
        assert 0 < result["target_busy"] <= 1
        # The utilization of a draft depends on the γ chosen in a few rounds.
        assert 0 <= (result["draft_busy"] or 0) <= (1 if num_drafts else 0)
        assert 0 < result["rows_per_pass"] <= num_sessions + 1
    samples = [s for s in document["samples"] if s["num_drafts"] == 2]
    assert [sorted(sample["busy"]) for sample in samples] == 2 * [["draft 0", "draft 1", "target"]]
    assert document["models"]["target"]["architecture"] == "simulated"
    plot = xml.etree.ElementTree.parse(tmp_path / "scaling.svg")
    assert plot.getroot().tag.endswith("svg")
