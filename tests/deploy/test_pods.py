"""Overlays as processes in network namespaces: scaling under load, loss of the Redis primary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.cluster.sandbox import UNSHARE, is_possible
from tests.deploy.sources import DEPLOY, ROOT, script

# A limit for hangs; each takes less than a minute on two free cores.
TIMEOUT_S = 560

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("OUTRIDER_TEST_PODS" not in os.environ, reason="`make pods` runs it, alone"),
    pytest.mark.timeout(TIMEOUT_S + 20),
]


def run_scenario(scenario: str, overlay: Path, directory: Path) -> dict[str, Any]:
    """Runs a scenario in `directory` and checks what all scenarios share; returns its result."""
    trial = directory / "trial"
    trial.mkdir()
    if not is_possible(trial):
        pytest.skip("no right to make network namespaces and mounts")
    place = directory / "cluster"
    place.mkdir()
    command = [sys.executable, "-m", "tests.deploy.cluster", scenario, str(overlay), str(place)]
    done = subprocess.run(
        [*UNSHARE, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{_logs(place / 'logs')}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(result["outputs"].values()) == {1}, "greedy output does not depend on the pods"
    assert result["num_accepted"] > 0, "some draft tokens were accepted"
    tiers = {n: num for n, num in result["num_restarts"].items() if "orchestrator" not in n}
    assert set(tiers.values()) == {0}, tiers
    return result


def test_pods_are_added_and_removed_under_load(tmp_path: Path) -> None:
    """No stream fails while replicas are added and removed."""
    result = run_scenario("grow_and_shrink", DEPLOY / "built/local.yaml", tmp_path)
    assert result["failures"] == []
    assert min(result["opened_at_added"]) > 0, "added pods got traffic"
    for pod in result["removed"]:
        assert pod["exit_statuses"] == [0], f"{pod['name']} was killed or failed"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="no haproxy")
def test_primary_redis_is_lost_under_load(tmp_path: Path) -> None:
    """Running generations finish; new calls are UNAVAILABLE until another primary is elected."""
    result = run_scenario("lose_redis", _with_three_redis(tmp_path), tmp_path)
    refused = result["failures"]
    assert all(failure["why"].startswith("UNAVAILABLE") for failure in refused), refused
    assert all(failure["num_tokens"] == 0 for failure in refused), "a generation was interrupted"
    last_s = max((failure["at"] - result["lost_at"] for failure in refused), default=0.0)
    print(f"{len(refused)} calls refused, the last {last_s:.1f} s after the loss")
    assert any(prompt.startswith("1500 of") for prompt in result["outputs"]), (
        "the long-running generation finished"
    )


def _with_three_redis(directory: Path) -> Path:
    """Builds the overlay `local` with `redis-ha`."""
    shutil.copytree(DEPLOY, directory / "deploy")
    own = directory / "deploy/overlays/three"
    own.mkdir()
    (own / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\n"
        "kind: Kustomization\n"
        "namespace: outrider\n"
        "resources: [../local]\n"
        "components: [../../components/redis-ha]\n",
        "utf-8",
    )
    made = directory / "three.yaml"
    made.write_text(script("gen_manifests").kustomize(own), "utf-8")
    return made


def _logs(directory: Path) -> str:
    """The last lines of each log."""
    return "\n".join(
        f"--- {path.name}\n{path.read_text('utf-8', 'replace')[-1500:]}"
        for path in sorted(directory.glob("*.log"))
    )
