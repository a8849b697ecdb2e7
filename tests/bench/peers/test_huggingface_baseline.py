"""Hugging Face baseline: plain and assisted generation give the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider_bench.models.synthetic import make_pair
from outrider_bench.peers.huggingface_baseline import HuggingFaceBaseline, serve

_PROMPT = [3, 141, 59, 26, 5, 35]
_NUM_TOKENS = 24
_SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_assistant_tokens": 5, "schedule": "constant"},
    {"num_assistant_tokens": 10, "schedule": "constant"},
    {"num_assistant_tokens": 5, "schedule": "heuristic"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    make_pair(directory, "tiny", alpha=0.8)
    return directory


@pytest.fixture(scope="module")
def baseline(pair: Path) -> HuggingFaceBaseline:
    return HuggingFaceBaseline(pair / "target", pair / "draft")


def _generate(baseline: HuggingFaceBaseline, **fields: Any) -> dict[str, Any]:
    request = {"prompt": _PROMPT, "max_new_tokens": _NUM_TOKENS, **fields}
    (answer,) = serve(baseline, [json.dumps(request)])
    return answer


@pytest.mark.parametrize("settings", _SETTINGS)
def test_assisted_greedy_is_plain_greedy(
    baseline: HuggingFaceBaseline, settings: dict[str, Any]
) -> None:
    """Token for token, with fewer target passes and some draft passes."""
    plain = _generate(baseline)
    assisted = _generate(baseline, variant="assisted", **settings)
    assert len(plain["token_ids"]) == _NUM_TOKENS
    assert assisted["token_ids"] == plain["token_ids"]
    assert plain["num_target_forwards"] == _NUM_TOKENS
    assert plain["num_draft_forwards"] == 0
    assert assisted["num_target_forwards"] < _NUM_TOKENS
    assert assisted["num_draft_forwards"] > 0


def test_times_belong_to_one_generation(baseline: HuggingFaceBaseline) -> None:
    """The rate counts tokens after the first ones; with one token there is no rate."""
    answer = _generate(baseline)
    assert 0 < answer["seconds_to_first"] < answer["seconds"]
    later = answer["seconds"] - answer["seconds_to_first"]
    assert answer["tokens_per_s"] == pytest.approx((_NUM_TOKENS - 1) / later)
    assert _generate(baseline, max_new_tokens=1)["tokens_per_s"] is None


@pytest.mark.parametrize("variant", ["plain", "assisted"])
def test_sampled_outputs_follow_the_seed(baseline: HuggingFaceBaseline, variant: str) -> None:
    """The same seed gives the same output, another seed another."""
    first, again, other = (
        _generate(baseline, variant=variant, temperature=1, seed=seed)["token_ids"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt: "),
        ({"prompt": [512]}, "prompt: has ids outside"),
        ({"prompt": 0}, "prompt: index out of range; there are 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"max_new_tokens": 20_000}, "max_new_tokens: 20006 tokens"),
        ({"variant": "magic"}, "variant: "),
        ({"schedule": "constant"}, "variant: plain accepts no"),
        ({"variant": "assisted", "schedule": "never"}, "schedule: "),
        ({"temperature": -1}, "temperature: "),
        ({"top_k": 3}, "top_k: is unknown"),
    ],
)
def test_invalid_request_is_answered_with_the_field(
    baseline: HuggingFaceBaseline, fields: dict[str, Any], message: str
) -> None:
    """The next request is served."""
    (error,) = _generate(baseline, **fields).items()
    assert error[0] == "error"
    assert error[1].startswith(message)
    assert "token_ids" in _generate(baseline, max_new_tokens=1)


@pytest.mark.slow
def test_program_answers_each_line(pair: Path, tmp_path: Path) -> None:
    """A ready line, then one answer per line. Prompts of a file are named by index."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([_PROMPT]))
    flags = ["--dtype=bfloat16", f"--prompts={prompts}"]
    flags += [f"--{name}={pair / name}" for name in ("target", "draft")]
    ended = subprocess.run(
        [sys.executable, "-m", "outrider_bench.peers.huggingface_baseline", *flags],
        input='{"prompt": 0, "max_new_tokens": 3}\n{"max_new_tokens": 3}\nnonsense\n',
        capture_output=True,
        text=True,
        check=True,
    )
    ready, answer, *errors = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ready["ready"] is True
    assert ready["num_prompts"] == 1
    assert len(answer["token_ids"]) == 3
    assert errors == [{"error": "prompt: is missing"}, {"error": "request: must be JSON"}]
