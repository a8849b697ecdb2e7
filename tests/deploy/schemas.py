"""Schemas of the custom resources, restricted to the fields that the manifests use.

After the CRDs of KEDA 2.17, the Prometheus operator 0.80, cert-manager 1.17, LeaderWorkerSet 0.7.
kubernetes-validate has the schemas of Kubernetes' own objects.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}
# A number that must be a string.
NUMBER_TEXT: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Schema of an object with these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


def listed(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


FALLBACKS = [
    "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower",
]  # fmt: skip
_SCALING = closed(
    {},
    {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": listed(
            closed(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                }
            )
        ),
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
    },
)
_METRIC_TYPE: Schema = {"enum": ["AverageValue", "Value", "Utilization"]}
_TRIGGER = closed(
    {
        # The only KEDA scaler that is used.
        "type": {"const": "prometheus"},
        "metadata": closed(
            {
                "serverAddress": {"type": "string", "pattern": "^https?://"},
                "query": TEXT,
                "threshold": NUMBER_TEXT,
            },
            {"activationThreshold": NUMBER_TEXT, "namespace": TEXT, "ignoreNullValues": TEXT},
        ),
    },
    {"name": TEXT, "metricType": _METRIC_TYPE},
)
SCALED_OBJECT = closed(
    {
        "scaleTargetRef": closed(
            {"name": TEXT}, {"apiVersion": TEXT, "kind": {"enum": ["Deployment", "StatefulSet"]}}
        ),
        "triggers": listed(_TRIGGER),
    },
    {
        "minReplicaCount": COUNT,
        "maxReplicaCount": {"type": "integer", "minimum": 1},
        "pollingInterval": COUNT,
        "cooldownPeriod": COUNT,
        "fallback": closed(
            {"failureThreshold": COUNT, "replicas": COUNT}, {"behavior": {"enum": FALLBACKS}}
        ),
        "advanced": closed(
            {},
            {
                "scalingModifiers": closed(
                    {"formula": TEXT, "target": NUMBER_TEXT},
                    {"activationTarget": NUMBER_TEXT, "metricType": _METRIC_TYPE},
                ),
                "horizontalPodAutoscalerConfig": closed(
                    {}, {"behavior": closed({}, {"scaleUp": _SCALING, "scaleDown": _SCALING})}
                ),
            },
        ),
    },
)
SERVICE_MONITOR = closed(
    {
        "selector": closed({"matchLabels": LABELS}),
        "endpoints": listed(
            closed({"port": TEXT}, {"interval": DURATION, "scrapeTimeout": DURATION, "path": TEXT})
        ),
    },
    {"namespaceSelector": closed({}, {"matchNames": listed(TEXT)})},
)
PROMETHEUS_RULE = closed(
    {
        "groups": listed(
            closed(
                {
                    "name": TEXT,
                    "rules": listed(
                        {
                            "oneOf": [
                                closed({"record": TEXT, "expr": TEXT}, {"labels": LABELS}),
                                closed(
                                    {"alert": TEXT, "expr": TEXT},
                                    {"for": DURATION, "labels": LABELS, "annotations": LABELS},
                                ),
                            ]
                        }
                    ),
                },
                {"interval": DURATION},
            )
        )
    }
)
ISSUER: Schema = {
    "oneOf": [closed({"selfSigned": closed({})}), closed({"ca": closed({"secretName": TEXT})})]
}
CERTIFICATE = closed(
    {
        "secretName": TEXT,
        "issuerRef": closed({"name": TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}}),
    },
    {
        "isCA": {"type": "boolean"},
        "commonName": {"type": "string", "maxLength": 64},
        "dnsNames": listed(TEXT),
        "duration": DURATION,
        "renewBefore": DURATION,
        "usages": listed(
            {"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}
        ),
        "privateKey": closed(
            {"algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}},
            {
                "size": {"enum": [256, 384, 521, 2048, 4096, 8192]},
                "rotationPolicy": {"enum": ["Never", "Always"]},
            },
        ),
    },
)

# The templates are checked as pods, by Kubernetes' own schema.
LEADER_WORKER_SET = closed(
    {
        "replicas": COUNT,
        "leaderWorkerTemplate": closed(
            {
                "size": {"type": "integer", "minimum": 2},
                "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "None"]},
                "leaderTemplate": {"type": "object"},
                "workerTemplate": {"type": "object"},
            }
        ),
    }
)

SPECS: dict[tuple[str, str], Schema] = {
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
    ("cert-manager.io/v1", "Issuer"): ISSUER,
    ("cert-manager.io/v1", "Certificate"): CERTIFICATE,
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): LEADER_WORKER_SET,
}


def whole(api_version: str, kind: str) -> Schema:
    """Schema of the whole object."""
    metadata = closed({"name": TEXT}, {"namespace": TEXT, "labels": LABELS, "annotations": LABELS})
    return closed(
        {
            "apiVersion": {"const": api_version},
            "kind": {"const": kind},
            "metadata": metadata,
            "spec": SPECS[api_version, kind],
        }
    )
