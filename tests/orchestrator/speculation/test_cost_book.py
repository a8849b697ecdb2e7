"""Cost book: costs by replica, statistics of the models shared."""

from __future__ import annotations

import pytest

from orchestrator.speculation.cost_book import CostBook
from outrider.replica import CostReport

STEP_S = {"fast": 0.01, "slow": 0.5}


def report(endpoint: str | None) -> CostReport:
    step_s = STEP_S[endpoint or "fast"]
    return CostReport((1, 64), (step_s, 2 * step_s))


def test_each_replica_has_its_own_costs() -> None:
    book = CostBook(report, report)
    fast, slow = book.pair(), book.pair()
    fast.target, fast.draft = book.target("fast"), book.draft("fast")
    slow.target, slow.draft = book.target("slow"), book.draft("slow")
    assert fast.target.steps_s(0) == pytest.approx((0.01,))
    assert slow.target.steps_s(0) == pytest.approx((0.5,))
    assert (fast.draft.step_s, slow.draft.step_s) == pytest.approx((0.01, 0.5))
    for _ in range(200):
        slow.observe_result(0.9, 0.5, has_waited=False)
        slow.observe_proposal(0.7, 1)
    assert slow.target.overhead_s == pytest.approx(0.4, rel=0.01)
    assert slow.draft.overhead_s == pytest.approx(0.2, rel=0.01)
    assert fast.target.overhead_s == fast.draft.overhead_s == 0.001


def test_a_generation_that_moves_uses_the_costs_known_of_the_new_replica() -> None:
    book = CostBook(report, report)
    pair = book.pair()
    pair.target = book.target("slow")
    pair.observe_result(0.9, 0.5, has_waited=False)
    known = pair.target.overhead_s
    pair.target = book.target("fast")
    assert pair.target.steps_s(0) == pytest.approx((0.01,))
    assert pair.target.overhead_s == 0.001
    pair.target = book.target("slow")
    assert pair.target.overhead_s == known


def test_statistics_are_shared_by_the_generations_of_a_draft_model() -> None:
    book = CostBook(report, report)
    one, other, another = book.pair("a"), book.pair("a"), book.pair("b")
    assert one.model is other.model is book.model("a")
    assert another.model is book.model("b") is not one.model
    for number in range(100):
        book.model(f"model {number}")
    assert book.model("a") is not one.model, "the least recently used are forgotten"


def test_statistics_of_the_tiers_are_shared() -> None:
    book = CostBook(report, report)
    one, other = book.pair(), book.pair()
    for _ in range(50):
        one.shared.observe_lookahead(is_hit=True)
    assert other.shared is one.shared is book.shared
    assert book.shared.lookahead_hit_rate > 0.6
    assert book.shared.num_lookahead_hits == 50


def test_a_new_generation_starts_with_the_costs_of_the_replica_used_last() -> None:
    book = CostBook(report, report)
    assert book.pair().target.steps_s(0) == pytest.approx((0.01,)), "of any replica"
    book.target("slow")
    assert book.pair().target.steps_s(0) == pytest.approx((0.5,))


def test_costs_of_the_least_recently_used_addresses_are_dropped() -> None:
    book = CostBook(lambda _: CostReport(), lambda _: CostReport())
    for number in range(1_000):
        book.target(f"10.0.0.1:{number}")
    assert len(book._targets) <= 256
