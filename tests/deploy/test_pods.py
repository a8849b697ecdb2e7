"""The overlay `local` as processes in namespaces of their own: it serves, grows and shrinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.cluster.sandbox import UNSHARE, is_possible
from tests.deploy.sources import DEPLOY, ROOT

# Against a hang: it takes some 40 s on two free cores.
TIMEOUT_S = 560


@pytest.mark.slow
@pytest.mark.skipif("OUTRIDER_TEST_PODS" not in os.environ, reason="`make pods` runs it, alone")
@pytest.mark.timeout(TIMEOUT_S + 20)
def test_pods_are_added_and_removed_under_load(tmp_path: Path) -> None:
    """Manifests' commands, environment, users, roots and probes; 0 streams fail, output is one."""
    trial = tmp_path / "trial"
    trial.mkdir()
    if not is_possible(trial):
        pytest.skip("no right to make network namespaces and mounts")
    directory = tmp_path / "cluster"
    directory.mkdir()
    command = [sys.executable, "-m", "tests.deploy.cluster", str(DEPLOY / "built/local.yaml")]
    done = subprocess.run(
        [*UNSHARE, *command, str(directory)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{_logs(directory / 'logs')}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failures"] == []
    assert set(told["outputs"].values()) == {1}, "greedy: whatever pods did it"
    assert told["num_accepted"] > 0, "drafts were of use"
    assert min(told["opened_at_added"]) > 0, "the added pods had traffic"
    for pod in told["removed"]:
        assert pod["exit_statuses"] == [0], f"{pod['name']} was killed, or failed"
    tiers = {n: num for n, num in told["num_restarts"].items() if "orchestrator" not in n}
    assert set(tiers.values()) == {0}, tiers


def _logs(directory: Path) -> str:
    """The end of each, to see why."""
    return "\n".join(
        f"--- {path.name}\n{path.read_text('utf-8', 'replace')[-1500:]}"
        for path in sorted(directory.glob("*.log"))
    )
