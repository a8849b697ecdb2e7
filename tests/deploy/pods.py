"""Rules for pods: security, probes, settings, files, grace periods.

Uses the programs' own settings loader. Rules have the form of tests/deploy/wiring.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from orchestrator.api.generate import STOP_GRACE_S
from orchestrator.app import SERVICE_NAME as ORCHESTRATOR
from outrider.errors import ConfigError
from outrider.runtime.grpc_server import LIVENESS
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import draft_pb2, target_pb2
from tests.deploy.manifests import Manifests, Object, Pod, title
from tests.deploy.wiring import secret_keys

TARGET = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name
DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name
# A model service finishes its current pass (model_server/lifecycle.py, which imports torch).
DEVICE_END_TIMEOUT_S = 3.0
# Reserve between the end of a stop and SIGKILL.
SPARE_S = 3.0

# By container: program, settings, gRPC service, and seconds of its stop beyond stop_grace_s.
PROGRAMS: dict[str, tuple[str, Any, str, float]] = {
    "target": ("target", TargetConfig, TARGET, DEVICE_END_TIMEOUT_S),
    "draft": ("draft", DraftConfig, DRAFT, DEVICE_END_TIMEOUT_S),
    "orchestrator": ("orchestrator", OrchestratorConfig, ORCHESTRATOR, STOP_GRACE_S),
}


def pods_are_restricted(found: Manifests) -> Iterator[str]:
    """Pod Security 'restricted', and a read-only root."""
    for pod in found.pods():
        wide = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name)]
        if wide:
            yield f"{pod.name}: {', '.join(wide)}"
        for volume in pod.spec.get("volumes", ()):
            if not volume.keys() & {"configMap", "secret", "emptyDir", "ephemeral", "projected"}:
                yield f"{pod.name}: volume {volume['name']} is of a kind that 'restricted' forbids"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: has a token of the API server"
        for container in pod.all_containers:
            for why in _privileges(pod.spec.get("securityContext", {}), container):
                yield f"{pod.name} {container['name']}: {why}"


def _privileges(pod: Object, container: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "may run as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", ())) - {
        "NET_BIND_SERVICE"
    }:
        yield "does not drop all capabilities"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "may write to its root"
    if any("hostPort" in port for port in container.get("ports", ())):
        yield "uses a host port"


def resources_are_bounded(found: Manifests) -> Iterator[str]:
    """Containers have requests for CPU and memory and a memory limit; images have a version."""
    for pod in found.pods():
        for container in pod.all_containers:
            asked = container.get("resources", {})
            requests, limits = asked.get("requests", {}), asked.get("limits", {})
            name = f"{pod.name} {container['name']}"
            if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
                yield f"{name}: no request for CPU or memory, or no memory limit"
            gpus = [side.get("nvidia.com/gpu") for side in (requests, limits)]
            if gpus[0] != gpus[1]:
                yield f"{name}: GPU request and limit differ"
            _, _, tag = container["image"].rpartition("/")[2].partition(":")
            if tag in ("", "latest"):
                yield f"{name}: its image has no version"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: Services would set variables of our settings"


def settings_load(found: Manifests) -> Iterator[str]:
    """The programs' loader accepts the environment."""
    for pod, container in _programs(found):
        try:
            settings(found, container)
        except ConfigError as error:
            yield f"{pod.name}: {error}"


def settings(found: Manifests, container: Object) -> Any:
    """Settings as the program loads them. Raises ConfigError."""
    program, kind, _, _ = PROGRAMS[container["name"]]
    environment = found.environment(container)
    foreign = [
        name
        for name in environment
        if name.startswith("OUTRIDER_") and not name.startswith(f"OUTRIDER_{program.upper()}_")
    ]
    if foreign:
        raise ConfigError(f"{foreign[0]}: of another program")
    return load(kind, program, [], environment)


def _programs(found: Manifests) -> Iterator[tuple[Pod, Object]]:
    for pod in found.pods():
        for container in pod.containers:
            if container["name"] in PROGRAMS:
                yield pod, container


def _loaded(found: Manifests) -> Iterator[tuple[Pod, Object, Any]]:
    """Containers whose settings load; `settings_load` reports the others."""
    for pod, container in _programs(found):
        try:
            yield pod, container, settings(found, container)
        except ConfigError:
            continue


def ports_are_the_settings(found: Manifests) -> Iterator[str]:
    """Named ports and `advertise` match the program's settings."""
    for pod, container, loaded in _loaded(found):
        numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
        wanted = {"grpc": "port", "health": "health_port", "metrics": "metrics_port"}
        for name, setting in wanted.items():
            if numbers.get(name) != getattr(loaded, setting):
                yield f"{pod.name}: port {name} is not {setting}"
        advertised = getattr(loaded, "advertise", None)
        if hasattr(loaded, "advertise") and advertised != f"10.0.0.1:{loaded.port}":
            yield f"{pod.name}: advertises {advertised}"
        if loaded.host in ("127.0.0.1", "localhost"):
            yield f"{pod.name}: listens on the loopback interface only"


def probes_match_services(found: Manifests) -> Iterator[str]:
    """Probes use the health port and a health name that fits their purpose."""
    for pod in found.pods():
        for container in pod.containers:
            if pod.workload["kind"] == "Job":
                continue
            for kind in ("readinessProbe", "livenessProbe"):
                if kind not in container and container["name"] not in ("sentinel", "rank"):
                    yield f"{pod.name} {container['name']}: no {kind}"
            for kind, probe in container.items():
                if kind.endswith("Probe"):
                    for why in _probe_problems(found, pod, container, kind, probe):
                        yield f"{pod.name} {container['name']}: {kind} {why}"


def _probe_problems(
    found: Manifests, pod: Pod, container: Object, kind: str, probe: Object
) -> Iterator[str]:
    for how in ("tcpSocket", "httpGet"):
        if how in probe and probe[how]["port"] not in pod.ports():
            yield f"asks port {probe[how]['port']}, which is not there"
    if probe.get("timeoutSeconds", 1) > probe.get("periodSeconds", 10):
        yield "takes longer than its period"
    if "grpc" not in probe:
        return
    environment = found.environment(container)
    program, _, service, _ = PROGRAMS[container["name"]]
    if str(probe["grpc"]["port"]) != environment.get(f"OUTRIDER_{program.upper()}_HEALTH_PORT"):
        yield "does not ask health_port"
    asked = probe["grpc"].get("service", "")
    if kind == "readinessProbe" and asked not in ("", service):
        yield f"asks for {asked!r}, which is not a readiness name"
    # A readiness name as liveness probe would kill a replica that waits or is busy.
    if kind == "livenessProbe" and asked != LIVENESS:
        yield f"asks for {asked!r}, which is not a liveness name"
    if asked not in ("", service, LIVENESS):
        yield f"asks for {asked!r}, which the program does not serve"


def grace_periods_suffice(found: Manifests) -> Iterator[str]:
    """preStop, drain and the last pass end before SIGKILL."""
    for pod, container, loaded in _loaded(found):
        sleep = _pre_stop_s(container)
        if sleep is None:
            yield f"{pod.name}: no preStop"
            continue
        needed = sleep + loaded.stop_grace_s + PROGRAMS[container["name"]][3]
        has = pod.spec.get("terminationGracePeriodSeconds", 30)
        if needed + SPARE_S > has:
            yield f"{pod.name}: its stop takes {needed:g} s, SIGKILL comes after {has} s"


def _pre_stop_s(container: Object) -> float | None:
    hook = container.get("lifecycle", {}).get("preStop", {})
    if "sleep" in hook:
        return float(hook["sleep"]["seconds"])
    command = hook.get("exec", {}).get("command", [])
    return float(command[1]) if command[:1] == ["sleep"] else None


def addresses_exist(found: Manifests) -> Iterator[str]:
    """redis_url names an existing Service and port, or a host outside the cluster."""
    for pod, _, loaded in _loaded(found):
        url = urlsplit(loaded.redis_url)
        host = (url.hostname or "").split(".")[0]
        if "." in (url.hostname or "") and ".svc" not in (url.hostname or ""):
            continue  # outside of the cluster
        services = [s for s in found.of("Service") if s["metadata"]["name"] == host]
        if not services:
            yield f"{pod.name}: redis_url names {host}, which is no Service"
        elif url.port not in [port["port"] for port in services[0]["spec"]["ports"]]:
            yield f"{pod.name}: redis_url: Service {host} has no port {url.port}"


def files_are_mounted(found: Manifests) -> Iterator[str]:
    """Settings that name a file name a key of a mounted Secret."""
    for pod, container, loaded in _loaded(found):
        for entry in fields(loaded):
            value = getattr(loaded, entry.name)
            is_file = entry.name.endswith(("_ca", "_cert", "_key", "_file"))
            is_file = is_file and isinstance(value, str)  # max_sessions_per_key is none
            if is_file and value and not _is_mounted(found, pod, container, value):
                yield f"{pod.name}: {entry.name}: nothing is mounted at {value}"


def _is_mounted(found: Manifests, pod: Pod, container: Object, path: str) -> bool:
    folder, key = str(PurePosixPath(path).parent), PurePosixPath(path).name
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    for mount in container.get("volumeMounts", ()):
        source = volumes.get(mount["name"], {}).get("secret")
        if mount["mountPath"] == folder and source is not None:
            items = [item["path"] for item in source.get("items", ())]
            return key in (items or secret_keys(found, source["secretName"]) or ())
    return False


def certificate_names_match(found: Manifests) -> Iterator[str]:
    """Certificates have the names that the other side requires."""
    names = {
        m["spec"]["secretName"]: m["spec"].get("dnsNames", []) for m in found.of("Certificate")
    }
    own: dict[str, list[str]] = {}
    for pod in found.pods():
        for volume in pod.spec.get("volumes", ()):
            if volume["name"] == "tls":
                own[pod.workload["metadata"]["name"]] = names.get(
                    volume["secret"]["secretName"], []
                )
    for pod, container, loaded in _loaded(found):
        if loaded.tls_cert is None:
            continue
        if container["name"] == "orchestrator":
            for tier in ("outrider-target", "outrider-draft"):
                if loaded.tier_tls_name not in own.get(tier, ()):
                    yield f"{pod.name}: {tier}'s certificate lacks {loaded.tier_tls_name}"
        elif not loaded.client_names & set(own.get("outrider-orchestrator", ())):
            yield f"{pod.name}: the orchestrator's certificate has none of the names it asks for"
    for made in found.of("Service"):
        server = names.get(f"{made['metadata']['name']}-tls")
        if server is not None and made["metadata"]["name"] not in server:
            yield f"{title(made)}: its certificate lacks its name"
