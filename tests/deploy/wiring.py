"""Rules of what belongs together: selectors and pods, ports, scalers and workloads, references.

Each rule is given built manifests and yields what is wrong, by the object's name. Validators see
objects one by one and miss all of this (docs/how-to/deploy.md, "What is checked").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.manifests import CLUSTER_SCOPED, Manifests, Object, Pod, selects, title

# Made by the operator, never in a repository; docs/how-to/deploy.md says how.
EXTERNAL_SECRETS = {
    "outrider-hub": {"token"},
    "outrider-redis": {"password", "users.acl", "replication.conf", "sentinel.conf"},
    "outrider-api-keys": {"keys"},
    "outrider-load-test": {"key"},
}
CERTIFICATE_KEYS = {"tls.crt", "tls.key", "ca.crt"}


def selectors_match(found: Manifests) -> Iterator[str]:
    """What selects pods selects at least one."""
    pods = found.pods()
    for made in found.of("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = made["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        if not any(selects(selector, pod.labels) for pod in pods):
            yield f"{title(made)}: selects no pod"
    for pod in pods:
        own = pod.workload["spec"].get("selector")
        if own is not None and not selects(own, pod.labels):
            yield f"{pod.name}: its selector does not match its own pods"
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            if not selects(spread["labelSelector"], pod.labels):
                yield f"{pod.name}: a topology spread that does not count its own pods"
    for made in found.of("ServiceMonitor"):
        if not _monitored(found, made):
            yield f"{title(made)}: selects no Service"


def _monitored(found: Manifests, monitor: Object) -> list[Object]:
    return [
        service
        for service in found.of("Service")
        if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
    ]


def workloads_are_apart(found: Manifests) -> Iterator[str]:
    """No two workloads, budgets or scalers claim the same pods."""
    pods = found.pods()
    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for made in found.of(kind):
            chosen = [pod.name for pod in pods if selects(made["spec"]["selector"], pod.labels)]
            if len(chosen) > 1:
                yield f"{title(made)}: selects the pods of {' and '.join(chosen)}"


def ports_exist(found: Manifests) -> Iterator[str]:
    """Services lead to ports that their pods have, monitors to ports that Services have."""
    for service in found.of("Service"):
        for pod in found.pods():
            if not selects(service["spec"].get("selector"), pod.labels):
                continue
            for port in service["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in pod.ports():
                    yield f"{title(service)}: port {port['name']} is none of {pod.name}"
    for monitor in found.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            for service in _monitored(found, monitor):
                if endpoint["port"] not in [port["name"] for port in service["spec"]["ports"]]:
                    yield f"{title(monitor)}: {title(service)} has no port {endpoint['port']}"
    yield from _doubled_ports(found)


def _doubled_ports(found: Manifests) -> Iterator[str]:
    for pod in found.pods():
        numbers = [p["containerPort"] for c in pod.containers for p in c.get("ports", ())]
        if len(numbers) != len(set(numbers)):
            yield f"{pod.name}: two containers listen on one port"


def policy_ports_exist(found: Manifests) -> Iterator[str]:
    """Policies open ports that the pods behind them have; those that they name are there."""
    pods = found.pods()
    for policy in found.of("NetworkPolicy"):
        own = [pod for pod in pods if selects(policy["spec"]["podSelector"], pod.labels)]
        for rule in policy["spec"].get("ingress", ()):
            yield from _closed(policy, rule, own)
        for side, key in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(side, ()):
                for peer in rule.get(key, ()):
                    yield from _peer(found, policy, rule, peer, is_egress=key == "to")


def _closed(policy: Object, rule: Object, pods: list[Pod]) -> Iterator[str]:
    for port in rule.get("ports", ()):
        if pods and not any(port["port"] in pod.ports() for pod in pods):
            yield f"{title(policy)}: none of its pods has port {port['port']}"


def _peer(
    found: Manifests, policy: Object, rule: Object, peer: Object, *, is_egress: bool
) -> Iterator[str]:
    if "podSelector" not in peer or "namespaceSelector" in peer:
        return
    others = [pod for pod in found.pods() if selects(peer["podSelector"], pod.labels)]
    if not others:
        yield f"{title(policy)}: a rule for pods that do not exist"
    if is_egress:
        yield from _closed(policy, rule, others)


def scalers_have_targets(found: Manifests) -> Iterator[str]:
    """A scaler's workload is there, has one scaler, and leaves its number to it."""
    scaled: dict[tuple[str, str], str] = {}
    for scaler in found.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec = scaler["spec"]
        target = (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        if not found.has(*target):
            yield f"{title(scaler)}: there is no {'/'.join(target)}"
        elif "replicas" in found.get(*target)["spec"]:
            yield f"{title(scaler)}: {'/'.join(target)} sets replicas, anew at each apply"
        if target in scaled:
            yield f"{title(scaler)}: {'/'.join(target)} has {scaled[target]} already"
        scaled[target] = title(scaler)
        low = spec.get("minReplicas", spec.get("minReplicaCount", 1))
        if low > spec.get("maxReplicas", spec.get("maxReplicaCount", 100)):
            yield f"{title(scaler)}: its least is more than its most"


def fallbacks_take_nothing_away(found: Manifests) -> Iterator[str]:
    """Without its metrics a scaler leaves at least what runs: KEDA's default goes to `replicas`."""
    for scaler in found.of("ScaledObject"):
        fallback = scaler["spec"].get("fallback")
        kept = ("currentReplicas", "currentReplicasIfHigher")
        if fallback is not None and fallback.get("behavior") not in kept:
            most = scaler["spec"].get("maxReplicaCount", 100)
            yield f"{title(scaler)}: without Prometheus {most} become {fallback['replicas']}"


def protocols_are_spoken(found: Manifests) -> Iterator[str]:
    """`appProtocol` of a gRPC port is that of the pods: h2c is without TLS."""
    for service in found.of("Service"):
        for pod in found.pods():
            if not selects(service["spec"].get("selector"), pod.labels):
                continue
            names = [name for each in pod.containers for name in found.environment(each)]
            has_tls = any(name.endswith("_TLS_CERT") for name in names)
            spoken = "https" if has_tls else "kubernetes.io/h2c"
            for port in service["spec"]["ports"]:
                if port.get("name") == "grpc" and port.get("appProtocol") != spoken:
                    said = port.get("appProtocol")
                    yield f"{title(service)}: appProtocol {said}; its pods speak {spoken}"


def references_exist(found: Manifests) -> Iterator[str]:
    """ConfigMaps, Secrets, their keys, accounts, classes, Services and volumes named are there."""
    for pod in found.pods():
        for name, kind in (
            ("serviceAccountName", "ServiceAccount"),
            ("priorityClassName", "PriorityClass"),
        ):
            if name in pod.spec and not found.has(kind, pod.spec[name]):
                yield f"{pod.name}: there is no {kind} {pod.spec[name]}"
        service = pod.workload["spec"].get("serviceName")
        if service is not None and not found.has("Service", service):
            yield f"{pod.name}: there is no Service {service}"
        for container in pod.all_containers:
            yield from _environment_exists(found, pod, container)
        yield from _volumes_exist(found, pod)
    for made in found.of("Certificate"):
        issuer = made["spec"]["issuerRef"]
        if not found.has(issuer["kind"], issuer["name"]):
            yield f"{title(made)}: there is no {issuer['kind']} {issuer['name']}"


def _environment_exists(found: Manifests, pod: Pod, container: Object) -> Iterator[str]:
    for source in container.get("envFrom", ()):
        yield from _missing(found, pod, "configMap", source["configMapRef"]["name"], ())
    for entry in container.get("env", ()):
        source = entry.get("valueFrom", {})
        for kind in ("configMap", "secret"):
            if reference := source.get(f"{kind}KeyRef"):
                name, key = reference["name"], reference["key"]
                yield from _missing(found, pod, kind, name, (key,))


def _volumes_exist(found: Manifests, pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    claims = {c["metadata"]["name"] for c in pod.workload["spec"].get("volumeClaimTemplates", ())}
    mounted = {m["name"] for c in pod.all_containers for m in c.get("volumeMounts", ())}
    for name in sorted(mounted - volumes.keys() - claims):
        yield f"{pod.name}: there is no volume {name}"
    for name in sorted((volumes.keys() | claims) - mounted):
        yield f"{pod.name}: nobody mounts the volume {name}"
    for volume in volumes.values():
        for kind, name_of in (("configMap", "name"), ("secret", "secretName")):
            if source := volume.get(kind):
                keys = tuple(item["key"] for item in source.get("items", ()))
                yield from _missing(found, pod, kind, source[name_of], keys)


def _missing(
    found: Manifests, pod: Pod, kind: str, name: str, keys: tuple[str, ...]
) -> Iterator[str]:
    has = secret_keys(found, name) if kind == "secret" else found.config(name)
    if has is None:
        yield f"{pod.name}: there is no {kind} {name}"
        return
    for key in keys:
        if key not in has:
            yield f"{pod.name}: {kind} {name} has no {key}"


def secret_keys(found: Manifests, name: str) -> set[str] | None:
    """Of a Secret that is here, that cert-manager makes, or that the operator brings."""
    if any(made["spec"]["secretName"] == name for made in found.of("Certificate")):
        return CERTIFICATE_KEYS
    if found.has("Secret", name):
        made: Object = found.get("Secret", name)
        values: dict[str, Any] = {**made.get("data", {}), **made.get("stringData", {})}
        return set(values)
    return EXTERNAL_SECRETS.get(name)


def namespaces_agree(found: Manifests) -> Iterator[str]:
    """Everything that can be is in one namespace."""
    for made in found.objects:
        if made["kind"] not in CLUSTER_SCOPED:
            namespace = made["metadata"].get("namespace")
            if namespace != "outrider":
                yield f"{title(made)}: is in namespace {namespace}"


def names_are_unique(found: Manifests) -> Iterator[str]:
    """No object is there twice."""
    seen: set[str] = set()
    for made in found.objects:
        if title(made) in seen:
            yield f"{title(made)}: is there twice"
        seen.add(title(made))
