"""Rules for dashboards, alerts and scalers: they use metrics that the programs export.

Metric names are those of outrider/telemetry/catalogue.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from outrider.replica import ReplicaState
from outrider.runtime.grpc_status import STATUS_NAMES
from outrider.telemetry.catalogue import CATALOGUE
from outrider.telemetry.metric import PREFIX, Metric, MetricKind
from tests.deploy.manifests import Manifests, strings, title

_NAME = re.compile(r"\boutrider[_:][a-z0-9_:]+")
_LABELS = re.compile(r"(outrider[_:][a-z0-9_:]+)\{([^}]*)\}")
_LABEL = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
_STATUSES = re.compile(r'\bstatus\s*(=~|!~|!=|=)\s*"([^"]*)"')
# The page with a section per alert.
RUNBOOK = "docs/how-to/troubleshoot.md"
# Added by Prometheus as it scrapes.
SCRAPED = {"namespace", "pod", "service", "job", "instance", "container", "endpoint", "le"}
# Names that prometheus-adapter-values.yaml gives to recorded series.
ADAPTED = {"outrider_draft_pressure"}


def exported() -> dict[str, Metric]:
    """Metrics by every exported series name."""
    names: dict[str, Metric] = {}
    for metric in CATALOGUE:
        ends = ("_bucket", "_sum", "_count") if metric.kind is MetricKind.HISTOGRAM else ("",)
        names.update({metric.exported_name + end: metric for end in ends})
    return names


def expressions(found: Manifests) -> Iterator[tuple[str, str]]:
    """Every PromQL expression with the name of its owner."""
    for rules in found.of("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            for rule in group["rules"]:
                yield f"{title(rules)} {rule.get('alert', rule.get('record'))}", rule["expr"]
    for scaler in found.of("ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            yield title(scaler), trigger["metadata"]["query"]
    for made in found.of("ConfigMap"):
        for name, text in made.get("data", {}).items():
            if name.endswith(".json"):
                for panel in json.loads(text)["panels"]:
                    for target in panel.get("targets", ()):
                        yield f"{title(made)} {panel['title']!r}", target["expr"]


def recorded(found: Manifests) -> set[str]:
    """Series of recording rules."""
    return {
        rule["record"]
        for rules in found.of("PrometheusRule")
        for group in rules["spec"]["groups"]
        for rule in group["rules"]
        if "record" in rule
    }


def metrics_exist(found: Manifests) -> Iterator[str]:
    """Expressions use exported or recorded series and their labels."""
    known, made = exported(), recorded(found)
    for whose, query in expressions(found):
        for name in _NAME.findall(query):
            if name not in known and name not in made:
                yield f"{whose}: there is no metric {name}"
        for name, labels in _LABELS.findall(query):
            own = set(known[name].labels) if name in known else set()
            for label in sorted(set(_LABEL.findall(labels)) - own - SCRAPED):
                yield f"{whose}: {name} has no label {label}"
        if any(query.count(pair[0]) != query.count(pair[1]) for pair in ("()", "{}", "[]")):
            yield f"{whose}: brackets do not match"


# Statuses caused by clients, and RESOURCE_EXHAUSTED, which has its own alert.
NOT_ERRORS = {
    "OK", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "NOT_FOUND", "ABORTED",
    "UNAUTHENTICATED", "PERMISSION_DENIED", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED",
}  # fmt: skip


def error_rates_exclude_client_errors(found: Manifests) -> Iterator[str]:
    """Expressions for service errors do not count statuses that clients cause."""
    for whose, query in expressions(found):
        for how, pattern in _STATUSES.findall(query):
            of = {name for name in STATUS_NAMES if re.fullmatch(pattern, name)}
            counted = of if how.startswith("=") else set(STATUS_NAMES) - of
            if counted - NOT_ERRORS and not counted >= {"OK"}:
                for name in sorted(counted & NOT_ERRORS):
                    yield f"{whose} counts {name} as an error"


def ratio_alerts_need_traffic(found: Manifests) -> Iterator[str]:
    """Alerts on a ratio of calls also require a minimum rate."""
    for rules in found.of("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            for rule in group["rules"]:
                is_share = re.search(r"outrider:(errors|refusals):", rule["expr"])
                if "alert" in rule and is_share and "rate(" not in rule["expr"]:
                    yield f"{title(rules)} {rule['alert']}: a single call can trigger it"


def scaler_metrics_exist(found: Manifests) -> Iterator[str]:
    """Metrics of HorizontalPodAutoscalers exist; per-pod ones are gauges."""
    known = exported()
    for scaler in found.of("HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            kind = metric["type"].lower()
            name = metric[kind]["metric"]["name"]
            if name in ADAPTED and kind == "external":
                continue
            if name not in known:
                yield f"{title(scaler)}: there is no metric {name}"
            elif known[name].kind is not MetricKind.GAUGE:
                yield f"{title(scaler)}: {name} is not a gauge"
    for scaler in found.of("ScaledObject"):
        formula = scaler["spec"].get("advanced", {}).get("scalingModifiers", {}).get("formula", "")
        names = {trigger.get("name") for trigger in scaler["spec"]["triggers"]}
        for word in sorted(set(re.findall(r"[a-z_]+", formula)) - names):
            yield f"{title(scaler)}: its formula has {word}, which is not a trigger"


_HEALTHY = {ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING}


def unhealthy_states_have_alerts(found: Manifests) -> Iterator[str]:
    """Every unhealthy replica state has an alert."""
    for rules in found.of("PrometheusRule"):
        alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
        asked = " ".join(rule["expr"] for rule in alerts if "alert" in rule)
        if not asked:
            continue
        for state in ReplicaState:
            if state not in _HEALTHY and f'replica_state{{state="{state.value}"}}' not in asked:
                yield f"{title(rules)}: no alert for a replica that is {state.value}"


def alerts_have_runbooks(found: Manifests, headings: set[str]) -> Iterator[str]:
    """Every alert has a severity, a summary and a runbook section."""
    for rules in found.of("PrometheusRule"):
        for group in rules["spec"]["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    for why in _alert_problems(rule, headings):
                        yield f"{title(rules)} {rule['alert']}: {why}"


def _alert_problems(rule: dict[str, Any], headings: set[str]) -> Iterator[str]:
    if rule.get("labels", {}).get("severity") not in ("page", "ticket"):
        yield "no severity"
    notes = rule.get("annotations", {})
    if not notes.get("summary"):
        yield "no summary"
    page, _, heading = notes.get("runbook", "").partition("#")
    if page != RUNBOOK or heading not in headings:
        yield f"{RUNBOOK} has no section {heading!r}"


def adapted_series(text: str) -> set[str]:
    """Series names in the adapter's rules, with alternatives of patterns expanded."""
    found: set[str] = set()
    for word in strings(text):
        for start, inner in re.findall(r"(outrider_)\(([^)]*)\)", word):
            found |= {start + each for each in inner.split("|")}
        found |= {name for name in _NAME.findall(word) if name != PREFIX}
    return found
