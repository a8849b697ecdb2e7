"""Mistakes for the rules of tests/deploy/pods.py."""

from __future__ import annotations

from tests.deploy import pods
from tests.deploy.planting import Mistake, container, named, pod, put, settings, spec

MISTAKES: list[Mistake] = [
    (
        pods.pods_are_restricted,
        lambda m: put(pod(m)["securityContext"], "runAsNonRoot", False),
        "may run as root",
    ),
    (
        pods.pods_are_restricted,
        lambda m: pod(m)["securityContext"].pop("seccompProfile"),
        "no seccomp profile",
    ),
    (
        pods.pods_are_restricted,
        lambda m: put(container(m)["securityContext"], "capabilities", {}),
        "does not drop all capabilities",
    ),
    (
        pods.pods_are_restricted,
        lambda m: put(container(m)["securityContext"], "readOnlyRootFilesystem", False),
        "may write to its root",
    ),
    (
        pods.pods_are_restricted,
        lambda m: put(
            pod(m)["initContainers"][0]["securityContext"], "allowPrivilegeEscalation", True
        ),
        "may gain privileges",
    ),
    (pods.pods_are_restricted, lambda m: put(pod(m), "hostNetwork", True), "hostNetwork"),
    (
        pods.pods_are_restricted,
        lambda m: put(pod(m)["volumes"], 0, {"name": "tls", "hostPath": {"path": "/"}}),
        "'restricted' forbids",
    ),
    (
        pods.pods_are_restricted,
        lambda m: pod(m).pop("automountServiceAccountToken"),
        "has a token",
    ),
    (
        pods.resources_are_bounded,
        lambda m: container(m)["resources"]["limits"].pop("memory"),
        "no memory limit",
    ),
    (
        pods.resources_are_bounded,
        lambda m: put(container(m)["resources"]["limits"], "nvidia.com/gpu", "2"),
        "GPU request and limit differ",
    ),
    (
        pods.resources_are_bounded,
        lambda m: put(container(m), "image", "registry:5000/outrider-model"),
        "has no version",
    ),
    (
        pods.resources_are_bounded,
        lambda m: pod(m).pop("enableServiceLinks"),
        "Services would set variables",
    ),
    (
        pods.settings_load,
        lambda m: put(settings(m), "OUTRIDER_TARGET_STOP_GRACE", "30"),
        "OUTRIDER_TARGET_STOP_GRACE: no such setting",
    ),
    (
        pods.settings_load,
        lambda m: put(settings(m), "OUTRIDER_TARGET_STOP_GRACE_S", "long"),
        "'long' is not of type",
    ),
    (
        pods.settings_load,
        lambda m: put(settings(m), "OUTRIDER_DRAFT_PORT", "1"),
        "of another program",
    ),
    (
        pods.settings_load,
        lambda m: settings(m).pop("OUTRIDER_TARGET_TLS_KEY"),
        "tls_key",
    ),
    (
        pods.ports_are_the_settings,
        lambda m: put(settings(m), "OUTRIDER_TARGET_METRICS_PORT", "9091"),
        "port metrics is not metrics_port",
    ),
    (
        pods.ports_are_the_settings,
        lambda m: put(settings(m), "OUTRIDER_TARGET_HOST", "127.0.0.1"),
        "listens on the loopback interface only",
    ),
    (
        pods.settings_load,
        lambda m: put(named(container(m)["env"], "POD_IP"), "name", "POD_ADDRESS"),
        "advertise: host '$(POD_IP)' has the character '$'",
    ),
    (
        pods.ports_are_the_settings,
        lambda m: put(named(container(m)["env"], "OUTRIDER_TARGET_ADVERTISE"), "value", "a:1"),
        "advertises a:1",
    ),
    (
        pods.probes_match_services,
        lambda m: put(container(m)["readinessProbe"]["grpc"], "port", 50052),
        "does not ask health_port",
    ),
    (
        pods.probes_match_services,
        lambda m: put(container(m)["readinessProbe"]["grpc"], "service", "outrider.Target"),
        "which the program does not serve",
    ),
    (
        pods.probes_match_services,
        lambda m: put(container(m)["livenessProbe"]["grpc"], "service", ""),
        "not a liveness name",
    ),
    (
        pods.probes_match_services,
        lambda m: put(container(m)["readinessProbe"]["grpc"], "service", "liveness"),
        "not a readiness name",
    ),
    (pods.probes_match_services, lambda m: container(m).pop("livenessProbe"), "no livenessProbe"),
    (
        pods.grace_periods_suffice,
        lambda m: put(pod(m), "terminationGracePeriodSeconds", 30),
        "its stop takes 38 s, SIGKILL comes after 30 s",
    ),
    (
        pods.grace_periods_suffice,
        lambda m: put(settings(m, "orchestrator"), "OUTRIDER_ORCHESTRATOR_STOP_GRACE_S", "140"),
        "its stop takes 152 s, SIGKILL comes after 150 s",
    ),
    (pods.grace_periods_suffice, lambda m: container(m).pop("lifecycle"), "no preStop"),
    (
        pods.addresses_exist,
        lambda m: put(settings(m), "OUTRIDER_TARGET_REDIS_URL", "rediss://redis:6379/0"),
        "names redis, which is no Service",
    ),
    (
        pods.addresses_exist,
        lambda m: put(settings(m), "OUTRIDER_TARGET_REDIS_URL", "rediss://outrider-redis:6380"),
        "has no port 6380",
    ),
    (
        pods.files_are_mounted,
        lambda m: put(settings(m), "OUTRIDER_TARGET_TLS_CLIENT_CA", "/tls/client.crt"),
        "tls_client_ca: nothing is mounted at /tls/client.crt",
    ),
    (
        pods.files_are_mounted,
        lambda m: put(settings(m), "OUTRIDER_TARGET_REDIS_PASSWORD_FILE", "/tls/password"),
        "redis_password_file: nothing is mounted",
    ),
    (
        pods.certificate_names_match,
        lambda m: spec(m, "Certificate", "outrider-draft")["dnsNames"].remove("tier"),
        "outrider-draft's certificate lacks tier",
    ),
    (
        pods.certificate_names_match,
        lambda m: spec(m, "Certificate", "outrider-orchestrator")["dnsNames"].remove(
            "orchestrator"
        ),
        "none of the names it asks for",
    ),
    (
        pods.certificate_names_match,
        lambda m: spec(m, "Certificate", "outrider-redis")["dnsNames"].remove("outrider-redis"),
        "Service/outrider-redis: its certificate",
    ),
]
