"""Mistakes for the schemas and the rules of tests/deploy/signals.py."""

from __future__ import annotations

from tests.deploy import signals
from tests.deploy.lint import alerts_have_runbooks, objects_are_valid
from tests.deploy.planting import (
    TARGET,
    Mistake,
    alert,
    alerts,
    container,
    put,
    scaler,
    spec,
    trigger,
)

MISTAKES: list[Mistake] = [
    (objects_are_valid, lambda m: put(container(m), "imagePulPolicy", "Always"), "imagePulPolicy"),
    (objects_are_valid, lambda m: put(spec(m, *TARGET), "replicas", "two"), "two"),
    (objects_are_valid, lambda m: put(trigger(m), "treshold", "8"), "treshold"),
    (objects_are_valid, lambda m: put(trigger(m), "threshold", 8), "8 is not of type 'string'"),
    (objects_are_valid, lambda m: put(alert(m), "for", "soon"), "soon"),
    (
        objects_are_valid,
        lambda m: put(spec(m, "ScaledObject", "outrider-draft")["fallback"], "behavior", "keep"),
        "'keep' is not one of",
    ),
    (
        signals.error_rates_exclude_client_errors,
        lambda m: put(
            alert(m), "expr", 'rate(outrider_requests_total{status=~"INTERNAL|CANCELLED"}[5m]) > 1'
        ),
        "OutriderNoTarget counts CANCELLED as an error",
    ),
    (
        signals.error_rates_exclude_client_errors,
        lambda m: put(
            alert(m), "expr", 'rate(outrider_requests_total{status!~"OK|CANCELLED"}[5m]) > 1'
        ),
        "counts DEADLINE_EXCEEDED as an error",
    ),
    (
        signals.ratio_alerts_need_traffic,
        lambda m: put(alert(m), "expr", "outrider:errors:ratio5m > 0.01"),
        "OutriderNoTarget: a single call can trigger it",
    ),
    (
        signals.metrics_exist,
        lambda m: put(trigger(m), "query", "sum(outrider_draft_queue_length)"),
        "there is no metric outrider_draft_queue_length",
    ),
    (
        signals.metrics_exist,
        lambda m: put(alert(m), "expr", 'outrider_replicas{tire="target"} == 0'),
        "outrider_replicas has no label tire",
    ),
    (
        signals.metrics_exist,
        lambda m: put(alert(m), "expr", "outrider:acceptance:ratio1h < 0.5"),
        "there is no metric outrider:acceptance:ratio1h",
    ),
    (
        signals.metrics_exist,
        lambda m: put(alert(m), "expr", "sum(outrider_redis_up"),
        "brackets do not match",
    ),
    (
        signals.metrics_exist,
        lambda m: m.get("ConfigMap", "outrider-dashboard")["data"].update(
            {"o.json": '{"panels": [{"title": "t", "targets": [{"expr": "outrider_ttft"}]}]}'}
        ),
        "there is no metric outrider_ttft",
    ),
    (
        signals.scaler_metrics_exist,
        lambda m: m.objects.append(scaler("other", "outrider_rows_waiting")),
        "there is no metric outrider_rows_waiting",
    ),
    (
        signals.scaler_metrics_exist,
        lambda m: m.objects.append(scaler("other", "outrider_tokens_total")),
        "is not a gauge",
    ),
    (
        signals.scaler_metrics_exist,
        lambda m: put(
            spec(m, "ScaledObject", "outrider-draft")["advanced"]["scalingModifiers"],
            "formula",
            "queue * (2 - hit)",
        ),
        "its formula has hit",
    ),
    (
        signals.unhealthy_states_have_alerts,
        lambda m: put(alerts(m)["OutriderReplicaFailing"], "expr", "outrider_redis_up == 0"),
        "no alert for a replica that is failing",
    ),
    (alerts_have_runbooks, lambda m: alert(m).pop("labels"), "no severity"),
    (
        alerts_have_runbooks,
        lambda m: put(alert(m)["annotations"], "runbook", "docs/how-to/troubleshoot.md#no-tokens"),
        "has no section",
    ),
]
