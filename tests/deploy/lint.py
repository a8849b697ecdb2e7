"""All rules of the lint by name, and the validation of each object by its schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator

import jsonschema
import kubernetes_validate

from tests.deploy import pods, schemas, signals, wiring
from tests.deploy.manifests import Manifests, Object, title
from tests.deploy.sources import ROOT

# The oldest that the manifests are for, and the newest that the validator knows.
KUBERNETES_VERSIONS = ("1.30", "1.37")

Rule = Callable[[Manifests], Iterator[str]]


def objects_are_valid(found: Manifests) -> Iterator[str]:
    """By Kubernetes' own schemas, strictly, or by ours for custom resources."""
    for made in found.objects:
        for why in invalid(json.dumps(made, sort_keys=True)):
            yield f"{title(made)}: {why}"


@functools.cache
def invalid(text: str) -> tuple[str, ...]:
    """What is wrong with an object, as JSON: most are the same in every overlay."""
    made = json.loads(text)
    key = (made["apiVersion"], made["kind"])
    if key in schemas.SPECS:
        validator = jsonschema.Draft202012Validator(schemas.whole(*key))
        return tuple(f"{error.json_path}: {error.message}" for error in validator.iter_errors(made))
    return tuple(why for version in KUBERNETES_VERSIONS for why in _refused(made, version))


def _refused(made: Object, version: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(made, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"Kubernetes {version}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"Kubernetes {version} knows no {made['apiVersion']} {made['kind']}"


def alerts_can_be_followed(found: Manifests) -> Iterator[str]:
    """Each alert names a section of docs/how-to/troubleshoot.md."""
    yield from signals.alerts_can_be_followed(found, headings())


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
    wiring.workloads_are_apart,
    wiring.ports_exist,
    wiring.policy_ports_exist,
    wiring.scalers_have_targets,
    wiring.fallbacks_take_nothing_away,
    wiring.protocols_are_spoken,
    wiring.references_exist,
    wiring.namespaces_agree,
    wiring.names_are_unique,
    pods.pods_are_restricted,
    pods.resources_are_bounded,
    pods.settings_load,
    pods.ports_are_the_settings,
    pods.probes_are_answered,
    pods.stops_have_time,
    pods.addresses_exist,
    pods.files_are_mounted,
    pods.certificates_fit,
    signals.metrics_exist,
    signals.errors_are_the_services_own,
    signals.pages_have_traffic,
    signals.unhealthy_states_have_alerts,
    signals.scaler_metrics_exist,
    alerts_can_be_followed,
)


def lint(found: Manifests) -> list[str]:
    """Everything that is wrong."""
    return [f"{rule.__name__}: {why}" for rule in RULES for why in rule(found)]
