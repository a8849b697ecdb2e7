"""The lint of the manifests: all rules, and schema validation of each object."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator

import jsonschema
import kubernetes_validate

from tests.deploy import pods, schemas, signals, wiring
from tests.deploy.manifests import Manifests, Object, templates, title
from tests.deploy.sources import ROOT

# The oldest supported version, and the newest that the validator has.
KUBERNETES_VERSIONS = ("1.30", "1.37")

Rule = Callable[[Manifests], Iterator[str]]


def objects_are_valid(found: Manifests) -> Iterator[str]:
    """Validates by Kubernetes' schemas, strictly, or by ours for custom resources."""
    for made in found.objects:
        for why in invalid(json.dumps(made, sort_keys=True)):
            yield f"{title(made)}: {why}"


@functools.cache
def invalid(text: str) -> tuple[str, ...]:
    """Schema errors of an object given as JSON; cached, as most objects are in every overlay."""
    made = json.loads(text)
    key = (made["apiVersion"], made["kind"])
    if key in schemas.SPECS:
        validator = jsonschema.Draft202012Validator(schemas.whole(*key))
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(made)]
        return (*errors, *(why for pod in _pods_of_group(made) for why in _kubernetes_errors(pod)))
    return tuple(_kubernetes_errors(made))


def _pods_of_group(made: Object) -> list[Object]:
    """The pods of a LeaderWorkerSet, as objects."""
    if made["kind"] != "LeaderWorkerSet":
        return []
    return [{"apiVersion": "v1", "kind": "Pod", **each} for each in templates(made).values()]


def _kubernetes_errors(made: Object) -> Iterator[str]:
    for version in KUBERNETES_VERSIONS:
        yield from _schema_errors(made, version)


def _schema_errors(made: Object, version: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(made, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"Kubernetes {version}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"Kubernetes {version} has no {made['apiVersion']} {made['kind']}"


def alerts_have_runbooks(found: Manifests) -> Iterator[str]:
    """Each alert names a section of docs/how-to/troubleshoot.md."""
    yield from signals.alerts_have_runbooks(found, headings())


def headings() -> set[str]:
    """Anchors of the headings in the runbook."""
    text = (ROOT / signals.RUNBOOK).read_text("utf-8")
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


RULES: tuple[Rule, ...] = (
    objects_are_valid,
    wiring.selectors_match,
    wiring.selectors_do_not_overlap,
    wiring.ports_exist,
    wiring.policy_ports_exist,
    wiring.scalers_have_targets,
    wiring.fallbacks_do_not_scale_down,
    wiring.app_protocols_match,
    wiring.references_exist,
    wiring.namespaces_agree,
    wiring.names_are_unique,
    pods.pods_are_restricted,
    pods.resources_are_bounded,
    pods.settings_load,
    pods.ports_are_the_settings,
    pods.probes_match_services,
    pods.grace_periods_suffice,
    pods.addresses_exist,
    pods.files_are_mounted,
    pods.certificate_names_match,
    signals.metrics_exist,
    signals.error_rates_exclude_client_errors,
    signals.ratio_alerts_need_traffic,
    signals.unhealthy_states_have_alerts,
    signals.scaler_metrics_exist,
    alerts_have_runbooks,
)


def lint(found: Manifests) -> list[str]:
    """All problems found."""
    return [f"{rule.__name__}: {why}" for rule in RULES for why in rule(found)]
