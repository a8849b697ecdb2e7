"""`outrider audit`: evidence in a table or as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from outrider.cli.audit import _view
from outrider.client.info import Audit
from outrider.client.messages import read_message
from outrider.v1 import orchestrator_pb2
from tests.cli.processes import run


@pytest.mark.slow
def test_an_audit_that_is_off(endpoint: str) -> None:
    done = run("audit", "--endpoint", endpoint)
    assert done.returncode == 0, done.stderr
    assert "--audit-share" in done.stdout
    done = run("audit", "--endpoint", endpoint, "--json")
    found = json.loads(done.stdout)
    assert found["share"] == 0
    assert found["num_generations"] == {"same": 0, "near_tie": 0, "mismatch": 0}
    assert [test["name"] for test in found["tests"]] == ["acceptance", "identity", "position"]


def _shown(**fields: Any) -> str:
    tests = [
        orchestrator_pb2.AuditTest(
            name="acceptance", num_trials=28_149, observed=0.8392, expected=0.8324,
            max_log_evidence=10.31, alarm_log_evidence=10.31, num_alarms=1,
            false_alarm_probability=1e-4 / 3, period_s=86_400, expected_trials=27_000,
        ),
        orchestrator_pb2.AuditTest(
            name="position", num_trials=9, observed=0.5, expected=0.5, max_log_evidence=40.0,
            false_alarm_probability=1e-4 / 3, period_s=86_400,
        ),
    ]  # fmt: skip
    found = orchestrator_pb2.GetAuditResponse(
        share=0.01, tolerance=1e-3, num_generations={"same": 1_200, "near_tie": 2, "mismatch": 1},
        num_dropped={"busy": 3, "failed": 0}, num_tokens=98_304, tests=tests, **fields,
    )  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    for part in _view(read_message(Audit, found)):
        console.print(part)
    return console.export_text()


def test_evidence_is_shown() -> None:
    """Counts, tests with their alarms, false alarms a week, and how fast a bias would be found."""
    shown = _shown()
    for text in ("1% of the generations", "1,200", "98,304 tokens", "dropped: busy", "1e17"):
        assert text in shown
    assert "at most 0.00047 false alarms a week" in shown
    assert "27,000 draft tokens" in shown
    assert "failed" not in shown
    assert "planted" not in shown


def test_failures_are_shown() -> None:
    """Token ids only if the orchestrator reports them."""
    known = orchestrator_pb2.AuditFailure(
        session_id="known", verification="greedy", index=15, prompt_len=12, gap=0.75,
        num_differing_tokens=4, replicas=["a:1"], rerun_replica="b:2", token_id=8, expected_id=9,
    )  # fmt: skip
    hidden = orchestrator_pb2.AuditFailure(
        session_id="hidden", verification="block", index=13, prompt_len=12, gap=2.5
    )
    shown = _shown(failures=[known, hidden], planted_bias=0.01)
    assert "3: 8 for 9" in shown
    for text in ("known", "hidden", "0.75", "a:1", "b:2", "outputs are wrong"):
        assert text in shown
