"""`outrider up --metrics` and `outrider top` as their user meets them."""

from __future__ import annotations

import pytest

from tests.cli.processes import Up, run

pytestmark = pytest.mark.timeout(400)


def test_what_up_prints_top_can_watch(running: Up) -> None:
    """An address for each program; all three are shown, with what was generated."""
    told = dict(line.split(": metrics on ") for line in running.lines if ": metrics on " in line)
    assert set(told) == {"target", "draft", "orchestrator"}
    asked = ["generate", "the quick", "--max-tokens=8", f"--endpoint={running.endpoint}"]
    assert run(*asked).returncode == 0
    wanted = (f"orchestrator {told['orchestrator']}", "redis up", "target ready 1")
    for _ in range(5):  # a program that stalls at the moment is shown as such
        done = run("top", "--once", *told.values())
        assert done.returncode == 0, done.stderr
        if all(words in done.stdout for words in (*wanted, told["target"], told["draft"])):
            break
    for words in wanted:
        assert words in done.stdout
    mistaken = run("top", "--once", running.endpoint)
    assert "not HTTP; is it metrics_port?" in mistaken.stdout
    assert "Traceback" not in mistaken.stderr
    for name in ("target", "draft"):
        (line,) = [line for line in done.stdout.splitlines() if told[name] in line]
        assert name in line
        assert "ready" in line
