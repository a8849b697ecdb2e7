"""Dockerfiles, compose.yaml, dashboard and load test, checked without building images.

tests/test_lock.py checks the images' packages.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
import yaml

from outrider.cli.app import app
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from tests.deploy.sources import DEPLOY, ROOT, built, script

dashboard = script("gen_dashboard")
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
# Seconds of a stop beyond stop_grace_s (tests/deploy/pods.py).
SPARE_S = 5


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile_is_pinned_staged_and_not_root(path: Any) -> None:
    text = path.read_text("utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    assert len(stages) > 2, "built in one stage, run in another"
    for image in re.findall(r"^ARG \w*_IMAGE=(\S+)", text, re.MULTILINE):
        tag = image.rpartition(":")[2]
        assert re.match(r"\d+\.\d+\.\d+", tag), f"{image} is not pinned"
    last = stages[-1]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "pip install" not in last
    assert re.search(r'^CMD \["python", "-m"', last, re.MULTILINE), "SIGTERM goes to the program"
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


def test_build_context_includes_copied_files() -> None:
    included = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    for path in DOCKERFILES:
        for source in re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE):
            for name in source.split():
                assert any(name == each or name.startswith(f"{each}/") for each in included), name


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("service", "kind"),
    [("target", TargetConfig), ("draft", DraftConfig), ("orchestrator", OrchestratorConfig)],
)
def test_compose_uses_existing_settings(service: str, kind: Any) -> None:
    """The stop grace period suffices; user, root, capabilities and Dockerfile are as required."""
    made = compose()["services"][service]
    environment = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for name, value in made["environment"].items()
    }
    settings = load(kind, service, [], environment)
    assert settings.host == "0.0.0.0"
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.stop_grace_s + SPARE_S <= int(made["stop_grace_period"].removesuffix("s"))
    assert made["user"] == "10001:10001"
    assert made["read_only"]
    assert made["cap_drop"] == ["ALL"]
    assert (DEPLOY / made["build"]["context"] / made["build"]["dockerfile"]).resolve().is_file()


def test_compose_and_manifests_run_the_same_redis() -> None:
    (manifest,) = {
        container["image"]
        for pod in built("local").pods()
        for container in pod.containers
        if container["name"] == "redis"
    }
    assert compose()["services"]["redis"]["image"] == manifest


def test_dashboard_is_up_to_date() -> None:
    """After a change run: python scripts/gen_dashboard.py."""
    assert dashboard.PATH.read_text("utf-8") == dashboard.dashboard()


def test_required_secrets_are_documented() -> None:
    from tests.deploy.wiring import EXTERNAL_SECRETS

    text = (ROOT / "docs/how-to/deploy.md").read_text("utf-8")
    for name, keys in EXTERNAL_SECRETS.items():
        assert f"`{name}`" in text
        for key in keys:
            assert f"`{key}`" in text, f"{name}: {key}"


@pytest.mark.parametrize("name", ["load-test", "load-test-prod"])
def test_load_test_uses_existing_flags(name: str) -> None:
    """Flags are those of `outrider bench serve`; the other containers print its files."""
    command: Any = typer.main.get_command(app())
    serve = command.get_command(None, "bench").get_command(None, "serve")
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    (pod,) = built(name).pods()
    (load_test,) = pod.spec["initContainers"]
    assert load_test["command"] == ["outrider", "bench", "serve"]
    given = [word for word in load_test["args"] if word.startswith("--")]
    assert given
    assert set(given) <= flags
    assert [container["command"] for container in pod.containers] == [
        ["cat", "/results/serve.json"],
        ["cat", "/results/serve.html"],
    ]
