"""Each rule finds the mistake that it is for, planted into manifests that are right."""

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
    ("rule", "plant", "said"), MISTAKES, ids=[f"{r.__name__}-{s[:40]}" for r, _, s in MISTAKES]
)
def test_a_planted_mistake_is_found(right: Manifests, rule: Rule, plant: Plant, said: str) -> None:
    """And before it was planted, nothing."""
    found = copy.deepcopy(right)
    plant(found)
    if rule is objects_are_valid:  # the others are as they were
        found.objects = [made for made in found.objects if made not in right.objects]
    problems = list(rule(found))
    assert problems
    assert any(said in problem for problem in problems), problems


def test_every_rule_has_its_mistake() -> None:
    assert {rule for rule, _, _ in MISTAKES} == set(RULES)


def test_the_adapter_asks_for_series_that_exist() -> None:
    """Of a file that is no manifest."""
    text = (DEPLOY / "components/autoscaling/prometheus-adapter-values.yaml").read_text("utf-8")
    known = signals.exported().keys() | signals.recorded(built("prod")) | signals.ADAPTED
    assert signals.adapted_series(text) - known == set()
    assert "outrider_waiting_rows" in signals.adapted_series(text)
