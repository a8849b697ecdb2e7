"""Helpers that plant mistakes in built manifests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.deploy.lint import Rule
from tests.deploy.manifests import Manifests

Plant = Callable[[Manifests], Any]

TARGET = ("StatefulSet", "outrider-target")


def spec(found: Manifests, kind: str, name: str) -> Any:
    return found.get(kind, name)["spec"]


def pod(found: Manifests, kind: str = TARGET[0], name: str = TARGET[1]) -> Any:
    return spec(found, kind, name)["template"]["spec"]


def container(found: Manifests, kind: str = TARGET[0], name: str = TARGET[1]) -> Any:
    return pod(found, kind, name)["containers"][0]


def settings(found: Manifests, program: str = "target") -> Any:
    return found.named("ConfigMap", f"outrider-{program}-")["data"]


def named(entries: list[Any], name: str) -> Any:
    return next(entry for entry in entries if entry["name"] == name)


def put(value: Any, key: Any, new: Any) -> None:
    value[key] = new


def alerts(found: Manifests) -> dict[str, Any]:
    """By name."""
    groups = spec(found, "PrometheusRule", "outrider-alerts")["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def alert(found: Manifests) -> Any:
    return spec(found, "PrometheusRule", "outrider-alerts")["groups"][0]["rules"][0]


def trigger(found: Manifests) -> Any:
    return spec(found, "ScaledObject", "outrider-draft")["triggers"][0]["metadata"]


def drop(found: Manifests, kind: str, name: str) -> None:
    found.objects.remove(found.get(kind, name))


def scaler(name: str, metric: str) -> dict[str, Any]:
    target = {"apiVersion": "apps/v1", "kind": TARGET[0], "name": TARGET[1]}
    pods_metric = {"metric": {"name": metric}, "target": {"type": "AverageValue"}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name, "namespace": "outrider"},
        "spec": {
            "scaleTargetRef": target,
            "maxReplicas": 2,
            "metrics": [{"type": "Pods", "pods": pods_metric}],
        },
    }


# Rule, change to correct manifests, part of the expected message.
Mistake = tuple[Rule, Plant, str]
