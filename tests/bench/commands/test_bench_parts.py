"""Parts of `outrider bench` that need no system: cores, order of runs, statistics, documents."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from outrider.cli.options import parse_cpus, parse_list
from outrider.cli.request import Method
from outrider.client.messages import read_message
from outrider.client.results import GammaDecision, SpeculationStats
from outrider.errors import ConfigError
from outrider.runtime.child_process import tied_to_this_process
from outrider.v1 import orchestrator_pb2, sampling_pb2
from outrider_bench.commands.explain import decision_table
from outrider_bench.commands.twin import survival
from outrider_bench.measuring.cores import CoreUse, core_for_orchestrator, core_per_tier
from outrider_bench.measuring.document import Document, Goal
from outrider_bench.measuring.load import Block, Sample, interleaved
from outrider_bench.measuring.plots import Bar, Line, Panel, draw, draw_bars
from outrider_bench.measuring.process import cpu_seconds, memory_bytes
from outrider_bench.measuring.show import progress, reporting
from outrider_bench.measuring.summary import Rounds, Speed
from outrider_bench.measuring.system import BenchOptions
from outrider_bench.measuring.workload import Prompts, Variant, fixed

AFFINITY = "import os; print(sorted(os.sched_getaffinity(0)))"


def stats(**changes: object) -> SpeculationStats:
    """Statistics of 9 tokens: after the first round, 3 rounds with two drafts and 1 without."""
    made = orchestrator_pb2.SpeculationStats(
        num_rounds=5, num_drafts=3, num_draft_tokens=6, num_accepted_tokens=4,
        num_rejected_tokens=1, num_lookahead_hits=2, num_rounds_per_gamma=[1, 0, 3],
        tokens_per_s=10.0, target_step_s=0.4, verify_s=0.6, draft_wait_s=0.2,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return read_message(SpeculationStats, made)


def sample(**changes: object) -> Sample:
    made = stats(**changes)
    return Sample("full", 0, 0, list(range(9)), made.tokens_per_s or 0.0, 0.1, 0.9, made)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", {0}), ("0-0", {0}), ("0,0", {0}), ("0-1,1", {0, 1})]
)
def test_cpu_lists_have_the_format_of_taskset(text: str, cpus: set[int]) -> None:
    if max(cpus) < (os.cpu_count() or 1):
        assert parse_cpus(text, "--target-cpus") == cpus


@pytest.mark.parametrize("text", ["", "a", "1-0", "-1", "0,", "0-", "4096"])
def test_invalid_cpu_list_is_rejected_with_the_flag_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--target-cpus"):
        parse_cpus(text, "--target-cpus")


@pytest.mark.parametrize("text", ["", "1,", "x", "1,-2"])
def test_invalid_list_is_rejected_with_the_flag_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--streams"):
        parse_list(text, "--streams", int)


def test_child_process_is_pinned_from_the_start() -> None:
    """The cores of the parent do not change."""
    before = os.sched_getaffinity(0)
    last = max(before)
    command = tied_to_this_process([sys.executable, "-c", AFFINITY], [last])
    assert json.loads(subprocess.check_output(command)) == [last]
    assert os.sched_getaffinity(0) == before


def test_child_fails_with_a_message_if_its_core_does_not_exist() -> None:
    command = tied_to_this_process([sys.executable, "-c", AFFINITY], [1023])
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "cpus 1023: cannot be had" in ended.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_pinned_layouts_give_each_tier_its_core() -> None:
    layout = core_per_tier(CoreUse.pinned)
    assert layout.target != layout.draft
    assert layout.target not in (layout.orchestrator, layout.bench)
    layout = core_for_orchestrator(CoreUse.pinned)
    assert layout.orchestrator not in (layout.target, layout.draft, layout.bench)


def test_pinning_of_this_process_ends_with_the_block() -> None:
    before = os.sched_getaffinity(0)
    if len(before) > 1:
        with core_per_tier(CoreUse.pinned).pins_this_process():
            assert len(os.sched_getaffinity(0)) == 1
    with core_per_tier(CoreUse.shared).pins_this_process():
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


def test_interleaved_reverses_every_second_repetition() -> None:
    assert list(interleaved("abc", 2)) == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "c"),
        (1, "b"),
        (1, "a"),
    ]


def test_statistics_over_rounds() -> None:
    """Computed by hand: 8 tokens after the first message, 10 per second, in 4 rounds of 0.1 s."""
    rounds = Rounds.of([sample(), sample()])
    assert rounds is not None
    assert rounds.alpha == pytest.approx(4 / 5)
    assert rounds.tau == pytest.approx(1 + 4 / 3)
    assert rounds.hit_rate == pytest.approx(2 / 3)
    assert rounds.mean_gamma == pytest.approx(6 / 4)
    assert rounds.tokens_per_round == pytest.approx(2)
    assert rounds.target_step_s == pytest.approx(0.1)
    assert rounds.draft_wait_share == pytest.approx(0.25)
    assert rounds.limit_tokens_per_s == pytest.approx(20)
    assert rounds.limit_share == pytest.approx(0.5)


def test_survival_is_conditional_on_the_previous_positions() -> None:
    """Counts only rounds with a draft token at the position: two of ten had a single one."""
    samples = [sample(num_drafts=10), sample(num_drafts=10)]
    for one in samples:
        assert one.stats is not None
        one.stats.num_accepted_tokens_per_pos.extend([8, 4, 3])
        one.stats.num_rounds_per_gamma[:] = [0, 2, 0, 8]
    assert survival(Block("γ 3", 2, 0, 1.0, 1.0, samples)) == (0.8, 0.625, 0.75)


def test_missing_statistics_are_none() -> None:
    """Peers report no statistics; plain decoding has no drafts."""
    assert Rounds.of([Sample("HF", 0, 0, [1, 2], 3.0, 0.1, 0.4)]) is None
    nothing = {"num_drafts": 0, "num_accepted_tokens": 0, "num_rejected_tokens": 0}
    times = {"target_step_s": 0.0, "verify_s": 0.0, "draft_wait_s": 0.0}
    rounds = Rounds.of([sample(**nothing, **times)])
    assert rounds is not None
    shares = (rounds.alpha, rounds.tau, rounds.hit_rate, rounds.draft_wait_share)
    assert shares == (None, None, None, None)
    assert (rounds.limit_tokens_per_s, rounds.limit_share) == (None, None)


def test_speed_is_a_median_with_its_range() -> None:
    assert Speed.of([3.0, 1.0, 2.0]) == Speed(2.0, 1.0, 3.0)


def test_goal_is_met() -> None:
    assert Goal("", 2.5, 2.5).is_met is True
    assert Goal("", 0.03, 0.04, is_most=True).is_met is False
    assert Goal("", 1.0, None).is_met is None


def test_document_records_how_to_repeat_the_measurement(tmp_path: Path) -> None:
    document = Document("speed", BenchOptions(out=tmp_path / "new"))
    document.samples += [sample().to_dict(), sample().to_dict()]
    document.goals.append(Goal("over plain", 2.5, 2.0))
    document.write()
    written = json.loads(document.path.read_text("utf-8"))
    assert {"command", "date", "git_commit", "machine", "versions", "options"} <= written.keys()
    assert written["goals"][0]["is_met"] is False
    assert written["options"]["cores"] == "pinned"
    assert written["samples"][0]["speculation"]["num_rounds_per_gamma"] == [1, 0, 3]
    assert written["samples"][0]["output_digest"] == written["samples"][1]["output_digest"]


def test_document_rejects_an_output_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        Document("speed", BenchOptions(out=tmp_path / "file"))


def test_plots_are_reproducible_svg(tmp_path: Path) -> None:
    lines = [Line("plain", [1, 2], [3.0, 4.0], [(2, 4), (3, 5)]), Line("full", [1, 2], [5.0, 6.0])]
    panels = [Panel("streams", "tokens/s", lines, is_log_x=True), Panel("x", "y", lines, level=1)]
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, "Many streams", panels)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw_bars(tmp_path / "bars.svg", "One", "tokens/s", [Bar("plain", 2, 1, 3), Bar("HF", 1, 1, 1)])
    for name in ("a.svg", "bars.svg"):
        assert xml.etree.ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
    assert "Many streams" in (tmp_path / "a.svg").read_text("utf-8")


def test_cpu_time_of_another_process_grows_with_its_work() -> None:
    loop = "import sys\nwhile True:\n  sum(range(10**6)); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            before = cpu_seconds(process.pid)
            # Earlier lines may be buffered: read until the CPU time has grown.
            while cpu_seconds(process.pid) <= before:
                process.stdout.readline()
            now, peak = memory_bytes(process.pid)
            assert 0 < now <= peak
        finally:
            process.kill()
    with pytest.raises(ConfigError, match="CPU time"):
        cpu_seconds(process.pid)


def test_prompts_are_reproducible() -> None:
    """Prompts depend only on seed and index; ids are within the vocabulary."""
    prompts, again = (Prompts(97, tokenizer=None, seed=3, length=16) for _ in range(2))
    assert [prompts.ids(i) for i in range(9)] == [again.ids(i) for i in range(9)]
    assert Counter(map(len, (prompts.ids(i) for i in range(9)))) == {16: 9}
    assert len({tuple(prompts.ids(i)) for i in range(9)}) == 9
    assert max(prompts.random_ids(0, 4096)) < 96


def test_an_error_keeps_the_results_so_far(tmp_path: Path) -> None:
    """As a signal does; the command raises it after its report. Without results it is raised."""
    written = io.StringIO()
    console = Console(file=written)

    def measure(num_samples: int) -> Document:
        document = Document("speed", BenchOptions(out=tmp_path))
        with progress(console, 3, document, document.samples) as step:
            step("first")
            document.samples += [{"number": i} for i in range(num_samples)]
            raise OSError("the replica is away")
        with pytest.raises(OSError, match="is away"), reporting(console, document):
            document.write()
        return document

    with pytest.raises(OSError, match="is away"):
        measure(0)
    saved = json.loads(measure(2).path.read_text("utf-8"))
    assert (saved["is_cut"], saved["samples"]) == (True, [{"number": 0}, {"number": 1}])
    assert "failed in step 1 of 3" in written.getvalue()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    """Their last 64 tokens, in order, then combined; errors name the flag."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"token_ids": {[i] * (60 + 8 * i)}}}\n' for i in (1, 2)))
    prompts = Prompts(97, tokenizer=None, seed=3, length=16, file=file)
    assert [prompts.ids(i) for i in range(2)] == [[1] * 64, [2] * 64]
    file.write_text("3\n")
    with pytest.raises(ConfigError, match=r"^--texts: .*, line 1: not a prompt"):
        Prompts(97, tokenizer=None, seed=3, length=16, file=file)


def test_variant_sets_the_fields_of_its_request() -> None:
    request = Variant("x", lookahead=2, fan_out=4, verification=Method.coupled).request([1], 8, 5)
    assert not request.HasField("gamma")
    assert (request.lookahead, request.fan_out) == (2, 4)
    assert request.verification == sampling_pb2.VERIFICATION_COUPLED
    assert (request.sampling.seed, request.sampling.ignore_eos) == (5, True)
    assert request.draft_wait == orchestrator_pb2.DRAFT_WAIT_UNSPECIFIED
    assert Variant("plain", gamma=0).request([1], 8, 5).HasField("gamma")
    assert fixed(3).request([1], 8, 5).draft_wait == orchestrator_pb2.DRAFT_WAIT_ALWAYS


def test_decision_table_marks_the_chosen_gammas() -> None:
    """One row for each γ from 0; two are marked."""
    decision = orchestrator_pb2.GammaDecision(
        gamma=2, waiting_gamma=0, survival=[0.8, 0.64], target_step_s=[0.02, 0.021, 0.022],
        tokens_per_s=[50, 80, 100], waiting_tokens_per_s=[50, 40, 30],
    )  # fmt: skip
    shown = decision_table(read_message(GammaDecision, decision))
    assert shown.row_count == 3
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["0", "1", "2"]
    assert cells[1] == ["", "0.80", "0.64"]
    assert ["chosen" in str(cell) for cell in cells[4]] == [False, False, True]
    assert ["chosen" in str(cell) for cell in cells[6]] == [True, False, False]
