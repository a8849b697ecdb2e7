"""`outrider chaos` end to end: real processes, a real Redis, real kills; nothing is left over."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from outrider_bench.chaos.faults import QUICK_FAULTS
from tests.cli import conftest
from tests.cli.processes import (
    ROOT,
    command,
    descendants,
    environment,
    interrupted,
    wait_until_dead,
)

pytestmark = pytest.mark.slow

target, draft = conftest.target, conftest.draft

# The run takes some tens of seconds; every killed program loads torch again.
_TIMEOUT_S = 280.0


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        cwd=ROOT, env=environment() | variables, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip


def results(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "chaos.json").read_text("utf-8"))
    return document


@pytest.mark.timeout(300)
def test_quick_run_has_no_problems(tmp_path: Path) -> None:
    """Simulated tiers, everything else real: all quick faults, all client behaviours."""
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text("# Reliability\n", "utf-8")
    flags = ("--simulate", "--quick", "--seed=1", f"--out={out}", f"--report={page}")
    with tempfile.TemporaryDirectory(prefix="c") as scratch:  # a short path: a socket is in it
        done = run("chaos", *flags, TMPDIR=scratch)
        assert list(Path(scratch).glob("outrider*")) == [], "files of ours are left"
    assert done.returncode == 0, done.stdout + done.stderr
    document = results(out)
    assert document["problems"] == []
    assert document["num_generations"] >= 36
    assert document["num_resumed_streams"] > 0
    assert {row["name"] for row in document["faults"]} == set(QUICK_FAULTS)
    assert sorted(path.name for path in out.iterdir()) == ["chaos.json", "chaos.md"]
    assert page.read_text("utf-8").startswith("# Reliability\n")
    assert "| target-kill |" in page.read_text("utf-8")


@pytest.mark.timeout(300)
def test_outputs_of_models_are_unchanged(target: Path, draft: Path, tmp_path: Path) -> None:
    """The KV of a killed replica is recomputed elsewhere. The other faults: see above."""
    done = run(
        "chaos", "--quick", f"--target={target}", f"--draft={draft}", "--generations=12",
        "--faults=target-kill,target-drop", "--concurrent=6",
        "--longest=2", "--kv-cache-tokens=8192", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "out")["num_faults"] >= 2


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_stopped(number: signal.Signals, tmp_path: Path) -> None:
    """During a fault, with a frozen process, and even by SIGKILL."""
    arguments = ("chaos", "--simulate", "--quick", "--faults=freeze", "--gap=0.2", "--longest=60")
    with subprocess.Popen(
        command(*arguments, f"--out={tmp_path / 'out'}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        try:
            # Faults begin with the load; a process is frozen soon.
            assert any(line.startswith("generations …") for line in process.stdout)
            children = descendants(process.pid)
            assert len(children) >= 7
            process.send_signal(number)
            rest = process.stdout.read() if number is signal.SIGINT else ""
            status = process.wait(60)
        finally:
            process.kill()
    wait_until_dead(children)
    if number is signal.SIGINT:
        assert status == 128 + number
        assert "Traceback" not in rest


@pytest.mark.timeout(300)
def test_ctrl_c_reports_the_results_so_far(tmp_path: Path) -> None:
    """Writes the files, marked as interrupted; leaves the report page unchanged."""
    page = tmp_path / "page.md"
    page.write_text("# Reliability\n", "utf-8")
    ended = interrupted(
        "chaos", "--simulate", "--faults=draft-kill,redis-drop", "--generations=100000",
        "--concurrent=4", "--max-tokens=20", f"--out={tmp_path / 'out'}", f"--report={page}",
        at="the load will take about",
    )  # fmt: skip
    output = ended.stdout
    assert ended.returncode == 128 + signal.SIGINT, output
    assert "at least 100000 generations" in output
    assert "stopped: " in output
    assert "of them were audited" in output
    assert "nothing lost" not in output
    document = results(tmp_path / "out")
    assert document["is_cut"]
    assert document["num_generations"] >= 4
    assert document["num_audited"] == 0
    assert "| **interrupted** | after " in (tmp_path / "out" / "chaos.md").read_text("utf-8")
    assert page.read_text("utf-8") == "# Reliability\n"
