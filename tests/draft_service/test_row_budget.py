"""Row budget: needed rows, then the most likely extensions, within the step costs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pytest

from draft_service.fair_share import FairShare
from draft_service.tree.kv_branches import Branch
from draft_service.tree.row_budget import RoundPace, RowBudget, best_extensions
from draft_service.tree.tree import SpeculationTree
from outrider.engine import Engine, EngineOptions, KVStore, load_engine
from outrider.model_server import step_costs as costs
from outrider.model_server.step_costs import StepCosts
from tests.services.noting import Clock, NotingEngine
from tests.services.parts import Pair

MAX_BRANCHES = 64
# A pass that takes as long as it has rows, and one that takes the same with any.
BY_ROWS = {"token_s": 0.001}
FLAT = {"base_s": 0.01, "token_s": 0.00001}


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Engine:
    return load_engine(EngineOptions(str(pair.draft), kv_cache_tokens=1024))


@dataclass
class Budgets:
    engine: Engine
    clock: Clock

    def of(self, seconds: dict[str, float], max_branches: int = MAX_BRANCHES) -> RowBudget:
        measured = StepCosts()
        measured.calibrate(NotingEngine(self.engine, self.clock, **seconds), 256)
        return RowBudget(measured, max_branches)


@pytest.fixture
def budgets(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Budgets:
    clock = Clock()
    monkeypatch.setattr(costs, "time", clock)
    return Budgets(engine, clock)


def test_rows_that_take_no_time_are_all_taken(budgets: Budgets) -> None:
    budget = budgets.of(FLAT)
    assert budget.num_rows(0) == (0, MAX_BRANCHES)
    waiting, total = budget.num_rows(20)
    assert waiting == 20
    assert 20 < total <= 20 + MAX_BRANCHES


def test_rows_that_take_time_are_for_waiting_generations(budgets: Budgets) -> None:
    """The more generations wait, the less is drafted ahead; then they are served in batches."""
    budget = budgets.of(BY_ROWS)
    assert budget.num_rows(3) == (3, 3)
    assert budget.num_rows(8) == (8, 8)
    assert budget.num_rows(100) == (8, 8)


def test_drafting_ahead_takes_at_most_a_round(budgets: Budgets) -> None:
    for round_s, fewest, most in ((0.01, 1, 1), (0.1, 8, 16), (10.0, MAX_BRANCHES, MAX_BRANCHES)):
        budget, pace = budgets.of(BY_ROWS), RoundPace()
        for _ in range(100):
            pace.observe(round_s, 4)
        waiting, total = budget.num_rows(0, [pace])
        assert waiting == 0
        assert fewest <= total <= most


def test_a_pause_does_not_count_as_a_long_round(budgets: Budgets) -> None:
    budget, pace = budgets.of(BY_ROWS), RoundPace()
    for _ in range(100):
        pace.observe(0.01, 4)
    pace.observe(1000.0, 4)
    assert budget.num_rows(0, [pace]) == (0, 1)


def test_the_target_with_the_shortest_rounds_limits_drafting_ahead(budgets: Budgets) -> None:
    """Rows for the other must not make its blocks late. A target without a round does not count."""
    budget, fast, slow = budgets.of(BY_ROWS), RoundPace(), RoundPace()
    for _ in range(100):
        fast.observe(0.1, 4)
        slow.observe(1.0, 4)
    of_fast, of_slow = (budget.num_rows(0, [pace]) for pace in (fast, slow))
    assert of_fast < of_slow
    assert budget.num_rows(0, [slow, RoundPace(), fast]) == of_fast


@pytest.mark.parametrize("seconds", [FLAT, BY_ROWS])
def test_no_branches_means_none(seconds: dict[str, float], budgets: Budgets) -> None:
    budget = budgets.of(seconds, max_branches=0)
    for num_waiting in range(12):
        waiting, total = budget.num_rows(num_waiting)
        assert total == waiting


def test_without_measured_costs_all_rows_are_taken() -> None:
    assert RowBudget(StepCosts(), 4).num_rows(30) == (30, 34)


@dataclass(eq=False)
class Owner:
    tree: SpeculationTree
    target: str = "one"


def owner(*probs: float, fan_out: int = 8, target: str = "one") -> Owner:
    """An owner whose prompt was run; `probs`: probabilities of the next token."""
    tree = SpeculationTree(
        np.zeros(64, np.int64),
        4,
        Branch(KVStore([], 1).open(1)),
        gamma=0,
        ahead_gamma=3,
        lookahead=1,
        fan_out=fan_out,
    )
    tree.add(tree.root, 0, None, list(enumerate(probs)))
    return Owner(tree, target)


def taken(
    owners: dict[str, Owner], num_rows: int, share: FairShare[Hashable] | None = None
) -> list[float]:
    """The probabilities of the rows; opens the alternatives."""
    rows = []
    for made, extension in best_extensions(owners, num_rows, share or FairShare()):
        rows.append(round(extension.prob, 6))
        if extension.opens:
            made.tree.open(extension.block, extension.block.branch)
    return rows


def test_the_most_likely_of_all_trees_come_first() -> None:
    owners = {"a": owner(0.6, 0.2, 0.1), "b": owner(0.5, 0.4, 0.05)}
    assert taken(owners, 4) == [0.6, 0.5, 0.4, 0.2]
    assert [len(made.tree.root.children) for made in owners.values()] == [2, 2]
    # What is open goes on; the rest has its turn after it.
    assert taken(owners, 100) == [0.6, 0.5, 0.4, 0.2, 0.1, 0.05]


def test_targets_take_turns_whatever_their_probabilities() -> None:
    """So a target that accepts less is drafted ahead for as well."""
    a, b, c = owner(0.6, 0.2), owner(0.5, 0.4), owner(0.3, 0.1, target="other")
    assert taken({"a": a, "b": b, "c": c}, 4) == [0.6, 0.3, 0.5, 0.1]
    share: FairShare[Hashable] = FairShare()
    singles = [
        taken({"a": owner(0.6, 0.2), "c": owner(0.3, 0.1, target="other")}, 1, share)
        for _ in range(4)
    ]
    assert sorted(singles) == [[0.3], [0.3], [0.6], [0.6]], "one row a pass: they alternate"


def test_fan_out_limits_the_openings_of_a_step() -> None:
    assert taken({"a": owner(0.5, 0.3, 0.2, fan_out=2)}, 9) == [0.5, 0.3]


def test_unlikely_extensions_are_not_drafted() -> None:
    owners = {"a": owner(0.6, 0.004), "b": owner(0.003, 0.002)}
    assert taken(owners, 9) == [0.6]
    assert list(owners) == ["a"], "it is not considered again until something changes"
    assert taken({"a": owner(0.02, 0.01)}, 9) == [], "a whole pass would not pay"


def test_owners_with_nothing_to_draft_are_removed() -> None:
    done = owner(0.6)
    done.tree.open(done.tree.root, done.tree.root.branch)
    (child,) = done.tree.root.children.values()
    for _ in range(3):
        done.tree.add(child, 1, None, [(1, 0.9)])
    owners = {"a": done}
    assert taken(owners, 9) == []
    assert owners == {}
