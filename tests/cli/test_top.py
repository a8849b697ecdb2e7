"""`outrider up --metrics` and `outrider top` together."""

from __future__ import annotations

import pytest

from tests.cli.processes import Up, run

pytestmark = pytest.mark.timeout(400)


def test_top_shows_the_programs_that_up_prints(running: Up) -> None:
    addresses = dict(
        line.split(": metrics on ") for line in running.lines if ": metrics on " in line
    )
    assert set(addresses) == {"target", "draft", "orchestrator"}
    command = ["generate", "the quick", "--max-tokens=8", f"--endpoint={running.endpoint}"]
    assert run(*command).returncode == 0
    wanted = (f"orchestrator {addresses['orchestrator']}", "redis up", "target ready 1")
    for _ in range(5):  # a stalled program is shown without metrics
        done = run("top", "--once", *addresses.values())
        assert done.returncode == 0, done.stderr
        if all(
            words in done.stdout for words in (*wanted, addresses["target"], addresses["draft"])
        ):
            break
    for words in wanted:
        assert words in done.stdout
    wrong_port = run("top", "--once", running.endpoint)
    assert "not an HTTP server; use the program's metrics_port" in wrong_port.stdout
    assert "Traceback" not in wrong_port.stderr
    for name in ("target", "draft"):
        (line,) = [line for line in done.stdout.splitlines() if addresses[name] in line]
        assert name in line
        assert "ready" in line
