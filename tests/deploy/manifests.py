"""Built manifests for the lint: objects by kind, pods with labels, environment, volumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Object = dict[str, Any]

WORKLOADS = ("Deployment", "StatefulSet", "Job", "LeaderWorkerSet")
CLUSTER_SCOPED = ("Namespace", "PriorityClass")
SOME_POD = {"status.podIP": "10.0.0.1", "metadata.name": "pod-0", "metadata.namespace": "outrider"}


@dataclass(frozen=True)
class Pod:
    """Pod template of a workload. `name` is Kind/name."""

    name: str
    labels: Mapping[str, str]
    spec: Object
    workload: Object

    @property
    def containers(self) -> list[Object]:
        return list(self.spec["containers"])

    @property
    def all_containers(self) -> list[Object]:
        """All containers, init containers included."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    def ports(self) -> dict[str | int, int]:
        """Port numbers by name and by number."""
        found: dict[str | int, int] = {}
        for container in self.containers:
            for port in container.get("ports", ()):
                found[port["containerPort"]] = port["containerPort"]
                found[port["name"]] = port["containerPort"]
        return found


@dataclass
class Manifests:
    """Objects of an overlay. Tests plant mistakes by changing `objects`."""

    objects: list[Object] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Manifests:
        return cls([made for made in yaml.safe_load_all(text) if made])

    def of(self, *kinds: str) -> list[Object]:
        return [made for made in self.objects if made["kind"] in kinds]

    def get(self, kind: str, name: str) -> Object:
        """Raises StopIteration if it does not exist."""
        return next(made for made in self.of(kind) if made["metadata"]["name"] == name)

    def named(self, kind: str, prefix: str) -> Object:
        """An object whose generated name starts with `prefix`."""
        return next(m for m in self.of(kind) if m["metadata"]["name"].startswith(prefix))

    def has(self, kind: str, name: str) -> bool:
        return any(made["metadata"]["name"] == name for made in self.of(kind))

    def pods(self) -> list[Pod]:
        return [
            Pod(name, template["metadata"].get("labels", {}), template["spec"], made)
            for made in self.of(*WORKLOADS)
            for name, template in templates(made).items()
        ]

    def config(self, name: str) -> dict[str, str] | None:
        """A ConfigMap's data; None: it does not exist."""
        found = [m for m in self.of("ConfigMap") if m["metadata"]["name"] == name]
        return dict(found[0].get("data", {})) if found else None

    def environment(self, container: Object, pod: Mapping[str, str] = SOME_POD) -> dict[str, str]:
        """Environment as the kubelet builds it: ConfigMaps, then single variables with $(NAME).

        `pod`: values of the pod's fields by path.
        """
        made: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            made.update(self.config(source["configMapRef"]["name"]) or {})
        for entry in container.get("env", ()):
            value = entry.get("value")
            if value is None:
                value = self._value_from(entry.get("valueFrom", {}), pod)
            if value is not None:
                made[entry["name"]] = expand(value, made)
        return made

    def _value_from(self, source: Object, pod: Mapping[str, str]) -> str | None:
        if reference := source.get("configMapKeyRef"):
            return (self.config(reference["name"]) or {}).get(reference["key"])
        if reference := source.get("fieldRef"):
            return pod[reference["fieldPath"]]
        return None  # from a Secret, which is not in the repository


def templates(workload: Object) -> dict[str, Object]:
    """Pod templates by name; a LeaderWorkerSet has two."""
    name = title(workload)
    if workload["kind"] != "LeaderWorkerSet":
        return {name: workload["spec"]["template"]}
    group = workload["spec"]["leaderWorkerTemplate"]
    return {f"{name} {role}": group[f"{role}Template"] for role in ("leader", "worker")}


def files(found: Manifests, volume: Object) -> dict[str, str]:
    """Files of a ConfigMap or Secret volume by name."""
    if source := volume.get("configMap"):
        data = found.config(source["name"]) or {}
    else:
        source = volume["secret"]
        data = found.get("Secret", source["secretName"])["stringData"]
    if items := source.get("items"):
        return {item["path"]: data[item["key"]] for item in items}
    return dict(data)


def title(made: Object) -> str:
    return f"{made['kind']}/{made['metadata']['name']}"


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Expands $(NAME); unknown names stay, as in Kubernetes."""
    for name, value in environment.items():
        text = text.replace(f"$({name})", value)
    return text


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector or a Service's labels select a pod. An empty selector selects all."""
    if not selector:
        return True
    if "matchLabels" not in selector and "matchExpressions" not in selector:
        selector = {"matchLabels": selector}
    wanted = selector.get("matchLabels", {})
    if any(labels.get(name) != value for name, value in wanted.items()):
        return False
    return all(_matches(term, labels) for term in selector.get("matchExpressions", ()))


def _matches(term: Object, labels: Mapping[str, str]) -> bool:
    value = labels.get(term["key"])
    match term["operator"]:
        case "In":
            return value in term["values"]
        case "NotIn":
            return value not in term["values"]
        case "Exists":
            return value is not None
        case _:
            return value is None


def strings(value: Any) -> Iterator[str]:
    """Every string in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
