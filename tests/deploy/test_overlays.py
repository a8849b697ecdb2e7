"""Every overlay, and every component on the base, passes the lint."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.api_server import api_server
from tests.deploy.lint import lint
from tests.deploy.manifests import Manifests, Object
from tests.deploy.schemas import SPECS
from tests.deploy.sources import DEPLOY, ROOT, built, script

# Overlays with the load test that is applied beside them.
SETS = {"local": ("local", "load-test"), "prod": ("prod", "load-test-prod")}
# tls and redis-ha together need a third component.
COMBINATIONS = (
    ("gpu",),
    ("draft-canary",),
    ("draft-canary", "gpu", "monitoring", "autoscaling"),
    ("tls",),
    ("policies",),
    ("ingress",),
    ("monitoring",),
    ("monitoring", "autoscaling"),
    ("monitoring", "autoscaling/keda"),
    ("redis-ha",),
    ("redis-ha", "policies"),
    ("redis-ha", "tls", "redis-ha/tls"),
    ("gpu", "policies", "multi-node", "multi-node/policies"),
)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


gen_manifests = script("gen_manifests")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_overlay_passes_the_lint(name: str) -> None:
    """Checks the committed files, so kubectl is not needed."""
    assert lint(built(*SETS[name])) == []


@pytest.mark.parametrize("name", gen_manifests.OVERLAYS)
def test_built_manifests_have_the_digest_of_their_sources(name: str) -> None:
    """After a change run: python scripts/gen_manifests.py."""
    text = (DEPLOY / f"built/{name}.yaml").read_text("utf-8")
    assert text.startswith(gen_manifests.header())


@needs_kubectl
@pytest.mark.parametrize("name", gen_manifests.OVERLAYS)
def test_built_manifests_equal_kubectls_output(name: str) -> None:
    text = (DEPLOY / f"built/{name}.yaml").read_text("utf-8")
    made = gen_manifests.kustomize(DEPLOY / gen_manifests.OVERLAYS[name])
    assert text == gen_manifests.header() + made


def overlay(directory: Path, lines: list[str]) -> Manifests:
    """Builds an overlay of these lines beside a copy of base and components."""
    for part in ("base", "components"):
        shutil.copytree(DEPLOY / part, directory / part)
    own = directory / "overlays/some"
    own.mkdir(parents=True)
    head = [
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        "namespace: outrider",
        "resources: [../../base]",
    ]
    (own / "kustomization.yaml").write_text("\n".join([*head, *lines]), "utf-8")
    return Manifests.parse(gen_manifests.kustomize(own))


@pytest.mark.slow
@needs_kubectl
@pytest.mark.parametrize("components", COMBINATIONS, ids=" ".join)
def test_component_on_the_base_passes_the_lint(components: tuple[str, ...], tmp_path: Path) -> None:
    """Alone, or with the components that it extends."""
    lines = ["components:", *(f"  - ../../components/{component}" for component in components)]
    made = overlay(tmp_path, lines)
    made.objects += built("load-test").objects
    assert lint(made) == []


@needs_kubectl
def test_documented_external_redis_passes_the_lint(tmp_path: Path) -> None:
    """Applies the lines of docs/how-to/deploy.md to all three programs."""
    guide = (ROOT / "docs/how-to/deploy.md").read_text("utf-8").partition("## Another Redis")[2]
    lines = guide.split("```yaml\n")[1].split("```")[0]
    head, generator, entry = lines.partition("configMapGenerator:\n")
    entries = [
        entry.replace("target", program).replace("TARGET", program.upper())
        for program in ("target", "draft", "orchestrator")
    ]
    made = overlay(tmp_path, [head, generator, *entries])
    assert lint(made) == []
    assert not any(
        "redis" in each["metadata"]["name"] for each in made.of("Service", "StatefulSet")
    )


def test_every_component_is_tested_and_documented() -> None:
    """Every component is in COMBINATIONS and has a README."""
    found = {
        str(path.parent.relative_to(DEPLOY / "components"))
        for path in (DEPLOY / "components").rglob("kustomization.yaml")
    }
    assert found == {component for each in COMBINATIONS for component in each}
    readmes = [DEPLOY / "components" / name / "README.md" for name in found]
    readmes += [DEPLOY / name / "README.md" for name in ("", "base", "load-test")]
    readmes += [DEPLOY / "overlays" / name / "README.md" for name in ("local", "prod")]
    assert [str(path) for path in readmes if not path.is_file()] == []


def _assets() -> Path | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS", "")
    return Path(folder) if folder and (Path(folder) / "kube-apiserver").exists() else None


@pytest.mark.skipif(_assets() is None, reason="KUBEBUILDER_ASSETS names no API server")
@needs_kubectl
@pytest.mark.parametrize("name", SETS)
def test_api_server_accepts_the_manifests(name: str, tmp_path: Path) -> None:
    """Dry run of all objects except custom resources on a local API server."""
    assets = _assets()
    assert assets is not None
    custom = {version.rpartition("/")[0] for version, _ in SPECS}
    plain = [
        made
        for made in built(*SETS[name]).objects
        if made["apiVersion"].rpartition("/")[0] not in custom
    ]
    namespace = [made for made in plain if made["kind"] == "Namespace"]
    with api_server(assets, tmp_path) as kubectl:
        _apply(kubectl, namespace)
        output = _apply(kubectl, plain, "--dry-run=server")
    assert "would violate PodSecurity" not in output


def _apply(kubectl: list[str], objects: list[Object], *flags: str) -> str:
    done = subprocess.run(
        [*kubectl, "apply", "--validate=strict", *flags, "-f", "-"],
        input=yaml.safe_dump_all(objects), text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr
