"""`outrider up`: stops what it starts however it ends; names what cannot start."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from outrider.runtime.main import HTTP_PREFIX
from tests.cli.conftest import write_tokenizer
from tests.cli.processes import descendants, run, up, wait_for_draft, wait_until_dead

pytestmark = pytest.mark.timeout(400)


SIMULATED = "--simulate-target=step_ms=1"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Exit status 0; processes stopped in order, the embedded Redis' directory removed.

    Until then HTTP answers.
    """
    with up(SIMULATED, "--http-port=0", f"--log-dir={tmp_path}") as started:
        (http,) = (line for line in started.lines if line.startswith(HTTP_PREFIX))
        with urlopen(f"http://{http.removeprefix(HTTP_PREFIX)}/health", timeout=60) as answer:
            assert answer.status == 200
        children = descendants(started.process.pid)
        assert len(children) == 3, children
        redis = next(line for line in children.values() if "unixsocket" in line)
        assert started.signal(signal.SIGINT) == 0
        assert not [pid for pid in children if pid in descendants(1)]
        assert started.process.stdout is not None
        assert started.process.stdout.read().split("\n")[:3] == [
            "orchestrator: stopped",
            "target: stopped",
            "redis: stopped",
        ]
    assert not Path(redis.partition("unixsocket:")[2].strip()).parent.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"target.log", "orchestrator.log"}


def test_stop_while_loading(target: Path, tmp_path: Path) -> None:
    """SIGTERM before it serves gives exit status 128 + 15, and leaves nothing."""
    with up(f"--target={target}", f"--log-dir={tmp_path}", serving=False) as started:
        started.read_until("target: loading")
        children = descendants(started.process.pid)
        assert started.signal(signal.SIGTERM) == 128 + signal.SIGTERM
        wait_until_dead(children, timeout_s=0.5)


@pytest.mark.slow
def test_a_dead_draft_costs_only_speed_and_a_killed_parent_leaves_nothing(
    target: Path, draft: Path, tmp_path: Path
) -> None:
    """Same output without the draft; SIGKILL of `up` ends all of its processes."""
    with up(f"--target={target}", f"--draft={draft}", f"--log-dir={tmp_path}") as started:
        wait_for_draft(started.endpoint)
        question = ["the quick", "--endpoint", started.endpoint, "--temperature=0", "--json"]
        # A fixed γ: the adaptive one may stay 0 for such a small pair.
        question += ["--max-tokens=16", "--gamma=3"]
        before = _answer_with_drafts(question)
        subprocess.run(["kill", "-9", str(started.pid_of("draft_service"))], check=True)
        assert "killed by SIGKILL" in started.read_until("draft died")
        after = json.loads(run("generate", *question).stdout)
        assert after["token_ids"] == before["token_ids"]
        assert after["origins"] == ["plain"] * 16

        children = descendants(started.process.pid)
        assert len(children) == 3, children
        started.process.kill()
        wait_until_dead(children)


def _answer_with_drafts(question: list[str]) -> dict[str, Any]:
    """On a busy machine drafts may be late for short outputs: repeats until some are used."""
    while True:
        answer: dict[str, Any] = json.loads(run("generate", *question).stdout)
        if answer["speculation"]["num_draft_tokens"]:
            return answer


@pytest.mark.slow
def test_a_dead_target_ends_it(tmp_path: Path) -> None:
    """Exit status 1 and the target's name; nothing is left."""
    with up(SIMULATED, f"--log-dir={tmp_path}") as started:
        children = descendants(started.process.pid)
        subprocess.run(["kill", "-9", str(started.pid_of("target_service"))], check=True)
        line = started.read_until("target died")
        assert "target.log" in line
        assert started.process.wait(60) == 1
        wait_until_dead(children, timeout_s=0.5)


@pytest.mark.slow
def test_a_missing_model(tmp_path: Path) -> None:
    """Exit status 2; program, directory and log are named, as for any model refused."""
    missing = tmp_path / "nowhere"
    ended = run("up", f"--target={missing}", "--port=0", f"--log-dir={tmp_path / 'logs'}")
    assert ended.returncode == 2
    assert "target did not start (exit code 2)" in ended.stderr
    assert str(missing) in ended.stderr
    assert "target.log" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_mismatched_tokenizers(target: Path, draft: Path, tmp_path: Path) -> None:
    """It serves without the draft and prints the reason."""
    other = shutil.copytree(draft, tmp_path / "other")
    write_tokenizer(other, ["entirely another text"] * 5)
    logs = f"--log-dir={tmp_path / 'logs'}"
    with up(f"--target={target}", f"--draft={other}", logs) as started:
        endpoint = started.endpoint
        line = started.read_until("the draft is not used")
        assert f"draft {other} and target do not share a vocabulary" in line
        ended = run("generate", "the quick", f"--endpoint={endpoint}", "--max-tokens=4", "--json")
        assert ended.returncode == 0
        shown = run("model", f"--endpoint={endpoint}")
        assert "draft pairing refused" in shown.stdout


def test_a_port_in_use() -> None:
    """Exit status 2 before any model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("up", f"--port={port}")
    assert ended.returncode == 2
    assert f"outrider: port: cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "loading" not in ended.stdout


@pytest.mark.slow
def test_simulated_tiers_behind_a_delayed_link(tmp_path: Path) -> None:
    """No model is loaded; drafts over a slow link do not change the output."""
    flags = ("--simulate-target=step_ms=5", "--simulate-draft=step_ms=0.5,survival=0.9")
    with up(*flags, "--draft-delay-ms=20", f"--log-dir={tmp_path}") as started:
        children = descendants(started.process.pid)
        assert len(children) == 4, children
        wait_for_draft(started.endpoint)
        question = ["--token-ids=1,2,3", "--endpoint", started.endpoint, "--json"]
        question += ["--max-tokens=48"]
        drafted = json.loads(run("generate", *question, "--gamma=4").stdout)
        plain = json.loads(run("generate", *question, "--gamma=0").stdout)
        assert drafted["token_ids"] == plain["token_ids"]
        assert drafted["speculation"]["num_accepted_tokens"] > 0
        assert started.signal(signal.SIGINT) == 0
        wait_until_dead(children, timeout_s=0.5)


@pytest.mark.slow
def test_a_simulated_target_alone(tmp_path: Path) -> None:
    """No draft is started: the quickstart draft could only guess at random."""
    with up(SIMULATED, f"--log-dir={tmp_path}") as started:
        assert len(descendants(started.process.pid)) == 3
        question = ["--token-ids=1,2,3", "--endpoint", started.endpoint, "--json"]
        answered = json.loads(run("generate", *question, "--max-tokens=8").stdout)
        assert answered["origins"] == ["plain"] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--inflate=lots", "--inflate: 'lots'"),
        ("--port=70000", "port: 70000 is not in"),
        ("--simulate-draft=step_ms=1", "--simulate-draft: needs --simulate-target"),
        (
            "--simulate-target=step_ms=-1",
            "simulate: step_ms: '-1' is invalid; must be 0 to 60000 milliseconds",
        ),
    ],
)
def test_wrong_flags(flag: str, words: str) -> None:
    """Exit status 2 and the flag's name, before anything is started."""
    ended = run("up", flag)
    assert ended.returncode == 2
    assert words in ended.stderr
