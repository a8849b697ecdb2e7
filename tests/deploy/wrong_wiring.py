"""Mistakes for the rules of tests/deploy/wiring.py."""

from __future__ import annotations

from tests.deploy import wiring
from tests.deploy.planting import TARGET, Mistake, container, drop, named, pod, put, scaler, spec

MISTAKES: list[Mistake] = [
    (
        wiring.fallbacks_do_not_scale_down,
        lambda m: spec(m, "ScaledObject", "outrider-orchestrator")["fallback"].pop("behavior"),
        "ScaledObject/outrider-orchestrator: without Prometheus 16 become 4",
    ),
    (
        wiring.fallbacks_do_not_scale_down,
        lambda m: put(spec(m, "ScaledObject", "outrider-target")["fallback"], "behavior", "static"),
        "ScaledObject/outrider-target: without Prometheus 8 become 2",
    ),
    (
        wiring.app_protocols_match,
        lambda m: put(
            spec(m, "Service", "outrider-target")["ports"][0], "appProtocol", "kubernetes.io/h2c"
        ),
        "Service/outrider-target: appProtocol kubernetes.io/h2c; its pods use https",
    ),
    (
        wiring.selectors_match,
        lambda m: put(spec(m, "Service", "outrider-draft")["selector"], "x", "y"),
        "Service/outrider-draft: selects no pod",
    ),
    (
        wiring.selectors_match,
        lambda m: put(spec(m, *TARGET)["selector"]["matchLabels"], "x", "y"),
        "does not match its own pods",
    ),
    (
        wiring.selectors_match,
        lambda m: put(
            pod(m)["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"], "x", "y"
        ),
        "does not count its own pods",
    ),
    (
        wiring.selectors_match,
        lambda m: put(
            spec(m, "ServiceMonitor", "outrider-target")["selector"]["matchLabels"], "x", "y"
        ),
        "ServiceMonitor/outrider-target: selects no Service",
    ),
    (
        wiring.selectors_do_not_overlap,
        lambda m: put(
            spec(m, "PodDisruptionBudget", "outrider-redis"),
            "selector",
            {"matchLabels": {"app.kubernetes.io/component": "redis"}},
        ),
        "PodDisruptionBudget/outrider-redis: selects the pods of",
    ),
    (
        wiring.ports_exist,
        lambda m: put(spec(m, "Service", "outrider")["ports"][0], "targetPort", "grcp"),
        "Service/outrider: port grpc is none of Deployment/outrider-orchestrator",
    ),
    (
        wiring.ports_exist,
        lambda m: put(
            spec(m, "ServiceMonitor", "outrider-draft")["endpoints"][0], "port", "metric"
        ),
        "has no port metric",
    ),
    (
        wiring.ports_exist,
        lambda m: put(container(m)["ports"][2], "containerPort", 8081),
        "two containers listen on one port",
    ),
    (
        wiring.policy_ports_exist,
        lambda m: put(
            spec(m, "NetworkPolicy", "outrider-orchestrator")["egress"][0]["ports"][0],
            "port",
            50053,
        ),
        "none of its pods has port 50053",
    ),
    (
        wiring.policy_ports_exist,
        lambda m: put(
            spec(m, "NetworkPolicy", "outrider-target")["ingress"][0]["from"][0]["podSelector"],
            "matchLabels",
            {"app": "gateway"},
        ),
        "a rule for pods that do not exist",
    ),
    (
        wiring.scalers_have_targets,
        lambda m: put(
            spec(m, "ScaledObject", "outrider-draft")["scaleTargetRef"], "kind", "Deployment"
        ),
        "there is no Deployment/outrider-draft",
    ),
    (
        wiring.scalers_have_targets,
        lambda m: put(spec(m, *TARGET), "replicas", 2),
        "sets replicas",
    ),
    (
        wiring.scalers_have_targets,
        lambda m: m.objects.append(scaler("second", "outrider_waiting_rows")),
        "has ScaledObject/outrider-target already",
    ),
    (
        wiring.references_exist,
        lambda m: put(container(m)["envFrom"][0]["configMapRef"], "name", "outrider-targets"),
        "no configMap outrider-targets",
    ),
    (
        wiring.references_exist,
        lambda m: put(
            pod(m)["initContainers"][0]["env"][0]["valueFrom"]["configMapKeyRef"], "key", "tagret"
        ),
        "has no tagret",
    ),
    (
        wiring.references_exist,
        lambda m: put(named(pod(m)["volumes"], "tls")["secret"], "secretName", "outrider-tls"),
        "no secret outrider-tls",
    ),
    (
        wiring.references_exist,
        lambda m: put(
            named(pod(m)["volumes"], "redis-password")["secret"]["items"][0], "key", "pasword"
        ),
        "has no pasword",
    ),
    (wiring.references_exist, lambda m: drop(m, "PriorityClass", "outrider-draft"), "Class"),
    (wiring.references_exist, lambda m: drop(m, "ServiceAccount", "outrider-redis"), "Account"),
    (wiring.references_exist, lambda m: drop(m, "Service", "outrider-target"), "no Service"),
    (wiring.references_exist, lambda m: drop(m, "Issuer", "outrider-ca"), "no Issuer outrider-ca"),
    (
        wiring.references_exist,
        lambda m: put(container(m)["volumeMounts"][0], "name", "model"),
        "there is no volume model",
    ),
    (
        wiring.namespaces_agree,
        lambda m: put(m.get("Service", "outrider")["metadata"], "namespace", "default"),
        "is in namespace default",
    ),
    (
        wiring.names_are_unique,
        lambda m: m.objects.append(m.get("Service", "outrider")),
        "is there twice",
    ),
]
