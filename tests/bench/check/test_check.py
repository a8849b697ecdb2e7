"""`outrider check` as a command: a whole check of tiny pairs through the real services."""

from __future__ import annotations

import json
import signal
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from outrider.quickstart_pair import DRAFT_PATH, TARGET_PATH
from outrider_bench.models.synthetic import make_pair
from tests.cli.processes import here, interrupted
from tests.e2e.test_other_tokenizer import with_permuted_ids
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Seconds on an idle machine. Its speed-ups mean nothing.
SMALL = ("--max-tokens=8", "--streams=1,2", "--repetitions=1", "--outputs=2", "--max-gamma=4")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("check")
    make_pair(directory, "tiny", epsilon=0.05)
    return directory


def test_a_check_measures_the_pair_and_reports_everything(pair: Path, tmp_path: Path) -> None:
    ended = here(
        "check", str(pair / "target"), str(pair / "draft"), "--temperatures=0,1",
        "--num-prompts=8", *SMALL, "--json", f"--out={tmp_path}", "--target-cost=4",
        "--draft-cost=1",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(ended.stdout)
    assert ended.returncode == (0 if report["is_worth_it"] else 3), ended.stderr
    (draft,) = report["drafts"]
    assert [one["temperature"] for one in draft["acceptance"]] == [0, 1]
    for one in draft["acceptance"]:
        assert one["num_tokens"] == 8 * 8
        assert 0 < one["alpha"] < 1
        assert one["survival"][0] <= 1
    points = [(one["temperature"], one["num_streams"]) for one in draft["speed_ups"]]
    assert points == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for one in draft["speed_ups"]:
        assert one["predicted"] >= 1
        if one["measured"]:
            assert one["off"] == pytest.approx(one["predicted"] / one["measured"] - 1)
        else:  # so short that the two streams did not overlap, on a busy machine
            assert (one["num_streams"], one["off"]) == (2, None)
        assert len(one["prediction"]["ahead"]) == len(one["prediction"]["in_turn"]) == 5
    assert [one["plain"] > 0 for one in draft["token_costs"]] == [True] * 4
    assert draft["costs"][0]["target_s"] > draft["costs"][0]["draft_s"] > 0
    assert json.loads((tmp_path / "check.json").read_text("utf-8"))["drafts"] == report["drafts"]
    plot = xml.etree.ElementTree.parse(tmp_path / "check.svg")
    assert plot.getroot().tag.endswith("svg")


def test_prompts_of_a_file_by_task_and_a_prediction_without_a_measurement(tmp_path: Path) -> None:
    """`--repetitions 0` starts the services for their costs only."""
    path = tmp_path / "prompts.jsonl"
    entries = [{"prompt": "def main():", "task": "x"}, {"prompt": "import os\n", "task": "y"}]
    path.write_text("\n".join(map(json.dumps, entries)), "utf-8")
    ended = here(
        "check", str(TARGET_PATH), str(DRAFT_PATH), f"--prompts={path}", "--temperatures=0.7",
        "--max-tokens=8", "--repetitions=0", "--streams=3", "--rtt-ms=4",
    )  # fmt: skip
    assert ended.returncode in (0, 3), ended.stderr
    assert "tokenizers: same" in ended.stdout
    assert "4 ms to the draft and back" in ended.stdout
    rows = [line.split() for line in ended.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("x", "y", "all")] == ["x", "y", "all"]
    assert any(row[:2] == ["0.7,", "3"] for row in rows)
    last = ended.stdout.strip().splitlines()[-1]
    assert last.startswith(("use γ ≈", "do not speculate:"))


def test_ctrl_c_reports_what_there_is(pair: Path) -> None:
    ended = interrupted(
        "check", str(pair / "target"), str(pair / "draft"), "--temperatures=0,1",
        "--num-prompts=80", *SMALL, at="3/4",
    )  # fmt: skip
    assert ended.returncode == 128 + signal.SIGINT, ended.stdout
    assert "reports the results so far" in ended.stdout
    assert "T = 0: α (equal argmax)" in ended.stdout
    assert "its speed was not measured" in ended.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--streams=0",), "--streams"),
        (("--temperatures=x",), "--temperatures"),
        (("--max-tokens=100000",), "--max-tokens: the longest prompt has 16 tokens"),
        (("--task=code",), "--prompts, --task: the target has no tokenizer"),
    ],
)
def test_wrong_flags_are_refused_by_name(pair: Path, flags: tuple[str, ...], message: str) -> None:
    ended = here("check", str(pair / "target"), str(pair / "draft"), *flags)
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr


def test_a_self_test_of_a_gemma_like_target(tmp_path: Path) -> None:
    """On a CPU it is run on request."""
    target = make_tiny_model("gemma3", tmp_path, vocab_size=300)
    ended = here("check", str(target), "--self-test", "--files-only", "--json")
    assert ended.returncode == 0, ended.stderr
    cases = json.loads(ended.stdout)["drafts"][0]["self_test"]
    assert len(cases) >= 6
    assert all(case["is_passed"] for case in cases)


def test_without_a_draft_prompt_lookup_is_checked() -> None:
    """Through the services, which propose from the prompt and the output."""
    ended = here(
        "check", str(TARGET_PATH), "--task=editing", "--temperatures=0", *SMALL[1:],
        "--max-tokens=32", "--json",
    )  # fmt: skip
    assert ended.returncode in (0, 3), ended.stderr
    (found,) = json.loads(ended.stdout)["drafts"]
    assert found["draft"] is None
    assert found["acceptance"] == found["costs"] == []
    uses = {use["task"]: use["rounds"] for use in found["lookup"]}
    assert set(uses) == {"editing", ""}
    assert uses[""]["tokens_per_round"] >= 1
    assert [one["num_streams"] for one in found["speed_ups"]] == [1, 2]
    one_stream, two_streams = (one["measured"] for one in found["speed_ups"])
    assert one_stream > 0
    assert two_streams is None or two_streams > 0, "None: the streams did not overlap"
    assert found["verdict"].startswith(("use prompt lookup: ", "do not speculate: "))


def test_a_draft_with_another_tokenizer_is_measured_in_the_real_loop(tmp_path: Path) -> None:
    """The quickstart draft with other ids re-encodes the text: `--target-tokenizer`."""
    permuted = with_permuted_ids(Path(DRAFT_PATH), tmp_path / "permuted")
    ended = here(
        "check", str(TARGET_PATH), str(permuted), "--task=code", "--temperatures=0",
        "--max-tokens=24", "--streams=1", "--repetitions=1", "--outputs=2", "--json",
    )  # fmt: skip
    assert ended.returncode in (0, 3), ended.stderr
    (found,) = json.loads(ended.stdout)["drafts"]
    assert found["inspection"]["is_reencoded"]
    assert found["inspection"]["refused"] == []
    (acceptance,) = found["acceptance"]
    assert acceptance["agreement"] is None
    assert acceptance["alpha"] == acceptance["loop_alpha"] > 0.2
    (speed_up,) = found["speed_ups"]
    assert speed_up["measured"] > 0
    assert speed_up["predicted"] >= 1
