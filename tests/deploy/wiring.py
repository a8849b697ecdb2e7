"""Rules for references between objects: selectors, ports, scalers, ConfigMaps, Secrets.

A rule takes built manifests and yields problems, each with the object's name. Schema validators see
single objects and cannot find these (docs/how-to/deploy.md, "What is tested").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.manifests import CLUSTER_SCOPED, Manifests, Object, Pod, selects, title

# Created by the operator, see docs/how-to/deploy.md.
EXTERNAL_SECRETS = {
    "outrider-hub": {"token"},
    "outrider-redis": {"password", "users.acl", "replication.conf", "sentinel.conf"},
    "outrider-api-keys": {"keys"},
    "outrider-load-test": {"key"},
}
CERTIFICATE_KEYS = {"tls.crt", "tls.key", "ca.crt"}


def selectors_match(found: Manifests) -> Iterator[str]:
    """Selectors of pods and Services select at least one."""
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


def selectors_do_not_overlap(found: Manifests) -> Iterator[str]:
    """No two workloads, budgets or scalers claim the same pods."""
    pods = found.pods()
    for kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
        for made in found.of(kind):
            chosen = [pod.name for pod in pods if selects(made["spec"]["selector"], pod.labels)]
            if len(chosen) > 1:
                yield f"{title(made)}: selects the pods of {' and '.join(chosen)}"


def ports_exist(found: Manifests) -> Iterator[str]:
    """Services name ports of their pods, monitors name ports of Services."""
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
    yield from _duplicate_ports(found)


def _duplicate_ports(found: Manifests) -> Iterator[str]:
    for pod in found.pods():
        numbers = [p["containerPort"] for c in pod.containers for p in c.get("ports", ())]
        if len(numbers) != len(set(numbers)):
            yield f"{pod.name}: two containers listen on one port"


def policy_ports_exist(found: Manifests) -> Iterator[str]:
    """Policies allow existing ports and name existing pods."""
    pods = found.pods()
    for policy in found.of("NetworkPolicy"):
        own = [pod for pod in pods if selects(policy["spec"]["podSelector"], pod.labels)]
        for rule in policy["spec"].get("ingress", ()):
            yield from _missing_ports(policy, rule, own)
        for side, key in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(side, ()):
                for peer in rule.get(key, ()):
                    yield from _peer(found, policy, rule, peer, is_egress=key == "to")


def _missing_ports(policy: Object, rule: Object, pods: list[Pod]) -> Iterator[str]:
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
        yield from _missing_ports(policy, rule, others)


def scalers_have_targets(found: Manifests) -> Iterator[str]:
    """A scaler's workload exists, has one scaler, and sets no replicas."""
    scaled: dict[tuple[str, str], str] = {}
    for scaler in found.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec = scaler["spec"]
        target = (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        if not found.has(*target):
            yield f"{title(scaler)}: there is no {'/'.join(target)}"
        elif "replicas" in found.get(*target)["spec"]:
            yield f"{title(scaler)}: {'/'.join(target)} sets replicas, which each apply would reset"
        if target in scaled:
            yield f"{title(scaler)}: {'/'.join(target)} has {scaled[target]} already"
        scaled[target] = title(scaler)
        low = spec.get("minReplicas", spec.get("minReplicaCount", 1))
        if low > spec.get("maxReplicas", spec.get("maxReplicaCount", 100)):
            yield f"{title(scaler)}: its least is more than its most"


def fallbacks_do_not_scale_down(found: Manifests) -> Iterator[str]:
    """Without metrics a scaler does not scale down, as KEDA would by default."""
    for scaler in found.of("ScaledObject"):
        fallback = scaler["spec"].get("fallback")
        unchanged = ("currentReplicas", "currentReplicasIfHigher")
        if fallback is not None and fallback.get("behavior") not in unchanged:
            most = scaler["spec"].get("maxReplicaCount", 100)
            yield f"{title(scaler)}: without Prometheus {most} become {fallback['replicas']}"


def app_protocols_match(found: Manifests) -> Iterator[str]:
    """`appProtocol` of a gRPC port matches the pods: https with TLS, h2c without."""
    for service in found.of("Service"):
        for pod in found.pods():
            if not selects(service["spec"].get("selector"), pod.labels):
                continue
            names = [name for each in pod.containers for name in found.environment(each)]
            has_tls = any(name.endswith("_TLS_CERT") for name in names)
            expected = "https" if has_tls else "kubernetes.io/h2c"
            for port in service["spec"]["ports"]:
                if port.get("name") == "grpc" and port.get("appProtocol") != expected:
                    given = port.get("appProtocol")
                    yield f"{title(service)}: appProtocol {given}; its pods use {expected}"


def references_exist(found: Manifests) -> Iterator[str]:
    """Referenced ConfigMaps, Secrets, keys, accounts, classes, Services and volumes exist."""
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
        yield f"{pod.name}: no container mounts the volume {name}"
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
    """Keys of a Secret: in the manifests, created by cert-manager, or by the operator."""
    if any(made["spec"]["secretName"] == name for made in found.of("Certificate")):
        return CERTIFICATE_KEYS
    if found.has("Secret", name):
        made: Object = found.get("Secret", name)
        values: dict[str, Any] = {**made.get("data", {}), **made.get("stringData", {})}
        return set(values)
    return EXTERNAL_SECRETS.get(name)


def namespaces_agree(found: Manifests) -> Iterator[str]:
    """All namespaced objects are in the namespace outrider."""
    for made in found.objects:
        if made["kind"] not in CLUSTER_SCOPED:
            namespace = made["metadata"].get("namespace")
            if namespace != "outrider":
                yield f"{title(made)}: is in namespace {namespace}"


def names_are_unique(found: Manifests) -> Iterator[str]:
    """No object occurs twice."""
    seen: set[str] = set()
    for made in found.objects:
        if title(made) in seen:
            yield f"{title(made)}: is there twice"
        seen.add(title(made))
