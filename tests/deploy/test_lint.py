"""Each rule finds a mistake planted in correct manifests."""

from __future__ import annotations

import copy

import pytest

from tests.deploy import signals, wrong_pods, wrong_signals, wrong_wiring
from tests.deploy.lint import RULES, Rule, objects_are_valid
from tests.deploy.manifests import Manifests
from tests.deploy.planting import Plant
from tests.deploy.sources import DEPLOY, built

MISTAKES = [*wrong_wiring.MISTAKES, *wrong_pods.MISTAKES, *wrong_signals.MISTAKES]


@pytest.fixture(scope="module")
def right() -> Manifests:
    return built("prod", "load-test-prod")


@pytest.mark.parametrize(
    ("rule", "plant", "message"), MISTAKES, ids=[f"{r.__name__}-{s[:40]}" for r, _, s in MISTAKES]
)
def test_planted_mistake_is_found(right: Manifests, rule: Rule, plant: Plant, message: str) -> None:
    """The rule reports the planted mistake; test_overlays checks that it reports nothing else."""
    found = copy.deepcopy(right)
    plant(found)
    if rule is objects_are_valid:  # only changed objects
        found.objects = [made for made in found.objects if made not in right.objects]
    problems = list(rule(found))
    assert problems
    assert any(message in problem for problem in problems), problems


def test_every_rule_has_a_mistake() -> None:
    assert {rule for rule, _, _ in MISTAKES} == set(RULES)


def test_adapter_queries_existing_series() -> None:
    """prometheus-adapter-values.yaml is not part of an overlay."""
    text = (DEPLOY / "components/autoscaling/prometheus-adapter-values.yaml").read_text("utf-8")
    known = signals.exported().keys() | signals.recorded(built("prod")) | signals.ADAPTED
    assert signals.adapted_series(text) - known == set()
    assert "outrider_waiting_rows" in signals.adapted_series(text)
