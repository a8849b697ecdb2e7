"""Overlays as processes in namespaces of their own: they serve, grow, shrink, lose their Redis."""

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

# Against a hang: each takes less than a minute on two free cores.
TIMEOUT_S = 560

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("OUTRIDER_TEST_PODS" not in os.environ, reason="`make pods` runs it, alone"),
    pytest.mark.timeout(TIMEOUT_S + 20),
]


def played(play: str, overlay: Path, directory: Path) -> dict[str, Any]:
    """What it told, in a `directory` of its own; output is one, drafts are of use."""
    trial = directory / "trial"
    trial.mkdir()
    if not is_possible(trial):
        pytest.skip("no right to make network namespaces and mounts")
    place = directory / "cluster"
    place.mkdir()
    command = [sys.executable, "-m", "tests.deploy.cluster", play, str(overlay), str(place)]
    done = subprocess.run(
        [*UNSHARE, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{_logs(place / 'logs')}"
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(told["outputs"].values()) == {1}, "greedy: whatever pods did it"
    assert told["num_accepted"] > 0, "drafts were of use"
    tiers = {n: num for n, num in told["num_restarts"].items() if "orchestrator" not in n}
    assert set(tiers.values()) == {0}, tiers
    return told


def test_pods_are_added_and_removed_under_load(tmp_path: Path) -> None:
    """Manifests' commands, environment, users, roots and probes; 0 streams fail."""
    told = played("grow_and_shrink", DEPLOY / "built/local.yaml", tmp_path)
    assert told["failures"] == []
    assert min(told["opened_at_added"]) > 0, "the added pods had traffic"
    for pod in told["removed"]:
        assert pod["exit_statuses"] == [0], f"{pod['name']} was killed, or failed"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="no haproxy")
def test_a_primary_redis_is_lost_under_load(tmp_path: Path) -> None:
    """Running answers go on; new calls are refused, at once, until another has its place."""
    told = played("lose_redis", _with_three_redis(tmp_path), tmp_path)
    refused = told["failures"]
    assert all(failure["why"].startswith("UNAVAILABLE") for failure in refused), refused
    assert all(failure["num_tokens"] == 0 for failure in refused), "an answer broke off"
    last_s = max((failure["at"] - told["lost_at"] for failure in refused), default=0.0)
    print(f"{len(refused)} calls refused, the last {last_s:.1f} s after the loss")
    assert any(question.startswith("1500 of") for question in told["outputs"]), "the running one"


def _with_three_redis(directory: Path) -> Path:
    """The overlay `local` with `redis-ha`, as kubectl makes it."""
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
    """The end of each, to see why."""
    return "\n".join(
        f"--- {path.name}\n{path.read_text('utf-8', 'replace')[-1500:]}"
        for path in sorted(directory.glob("*.log"))
    )
