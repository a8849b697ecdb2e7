"""Step costs: calibrated at start, corrected at each pass, reported over the wire."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from outrider.engine import Engine, EngineOptions, load_engine
from outrider.model_server import step_costs as costs
from outrider.model_server.step_costs import StepCosts
from outrider.replica import CostReport
from outrider.runtime.protobuf import costs_from_proto, costs_to_proto
from tests.services.noting import Clock, NotingEngine
from tests.services.parts import Pair


@pytest.fixture(scope="module")
def engine(pair: Pair) -> Engine:
    return load_engine(EngineOptions(str(pair.draft), kv_cache_tokens=1024))


Noted = Callable[..., NotingEngine]


@pytest.fixture
def noted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Noted:
    """An engine with a simulated clock, which StepCosts reads."""
    clock = Clock()
    monkeypatch.setattr(costs, "time", clock)
    return lambda **seconds: NotingEngine(engine, clock, **seconds)


def test_calibration_measures_and_frees_its_memory(noted: Noted) -> None:
    noting = noted(base_s=0.01, token_s=0.001, row_s=0.002)
    measured = StepCosts()
    measured.calibrate(noting, 64)
    report = measured.report
    assert report.num_tokens == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert report.step_s == pytest.approx([0.01 + 0.001 * n for n in report.num_tokens])
    assert report.row_s == pytest.approx(0.002)
    assert report.pass_s(5, 1) == pytest.approx(0.015), "between the points"
    assert report.pass_s(100, 10) == pytest.approx(0.11 + 9 * 0.002), "and beyond"
    assert (noting.store.used_tokens, noting.store.num_sequences) == (0, 0)
    noting.store.check_integrity()


def test_the_curve_is_monotonic(noted: Noted) -> None:
    """A larger pass that seems faster is noise; the cost of a row is not negative."""
    noting = noted(base_s=1.0, token_s=-0.001, row_s=-0.01)
    measured = StepCosts()
    measured.calibrate(noting, 32)
    assert all(a <= b for a, b in itertools.pairwise(measured.report.step_s))
    assert measured.report.row_s == 0


@pytest.mark.parametrize(("num_free", "most"), [(64, 32), (32, 0), (1024, 256)])
def test_calibration_with_little_kv_room(num_free: int, most: int, noted: Noted) -> None:
    noting = noted(base_s=0.01, token_s=0.001)
    taken = noting.store.open(1024 - num_free) if num_free < 1024 else None
    measured = StepCosts()
    measured.calibrate(noting, 512)
    assert max(measured.report.num_tokens) == (most or 1)
    assert (measured.report == StepCosts().report) == (most == 0), (
        "without a measurement the report is empty"
    )
    if taken is not None:
        noting.store.free(taken)
    assert noting.store.used_tokens == 0


def test_a_slow_model_has_fewer_points(noted: Noted) -> None:
    """The points are far apart, so the cost of many sessions is known nearly as well.

    Regression: with points at 1, 2 and 3 the slope beyond them was noise. With a flat slope γ was
    16 for 64 sessions, at half of the throughput without drafts.
    """
    measured = StepCosts()
    measured.calibrate(noted(base_s=2.0, token_s=0.01), 512)
    assert measured.report.num_tokens == (1, 16, 64)
    assert measured.report.pass_s(256, 1) == pytest.approx(2 + 2.56, rel=0.01)


def test_a_slow_size_is_measured_once(noted: Noted) -> None:
    """So a large model starts soon. Of a fast model's measurements the minimum is taken."""
    slow, quick = noted(base_s=2.0), noted(base_s=0.001)
    begin = slow.clock.now
    StepCosts().calibrate(slow, 512)
    took_s = slow.clock.now - begin
    begin = quick.clock.now
    StepCosts().calibrate(quick, 512)
    assert took_s == pytest.approx(4 * 2 * 2.0), "three sizes and the rows, each after its context"
    assert quick.clock.now - begin == pytest.approx(17 * (1 + 3) * 0.001)


def test_observed_durations_change_the_report(noted: Noted) -> None:
    """A machine that became three times slower is reported after some passes of all sizes."""
    noting = noted(base_s=0.01, token_s=0.001, row_s=0.002)
    measured = StepCosts()
    measured.calibrate(noting, 64)
    first = measured.report
    for index in range(600):
        noting.clock.now += 0.1
        num_tokens = (2, 4, 10, 20, 40)[index % 5]
        measured.observe(num_tokens, 2, 3 * first.pass_s(num_tokens, 2))
    assert measured.report is not first
    for num_tokens in (2, 4, 10, 20, 40):
        real_s = 3 * first.pass_s(num_tokens, 2)
        assert measured.step_s(num_tokens, 2) == pytest.approx(real_s, rel=0.05)
        assert measured.report.pass_s(num_tokens, 2) == pytest.approx(real_s, rel=0.1)
    assert measured.report.mean_num_rows == pytest.approx(2, rel=0.05)


def test_one_slower_size_is_reported_and_the_curve_stays_monotonic(noted: Noted) -> None:
    """Regression: only the cost of one token was compared, so a changed curve was not reported."""
    noting = noted(base_s=0.01, token_s=0.001)
    measured = StepCosts()
    measured.calibrate(noting, 64)
    first = measured.report
    for _ in range(300):
        noting.clock.now += 0.1
        measured.observe(12, 1, 1.5 * first.pass_s(12, 1))
        measured.observe(1, 1, first.pass_s(1, 1))
        assert all(a <= b for a, b in itertools.pairwise(measured.report.step_s))
    assert measured.report.pass_s(12, 1) == pytest.approx(1.5 * first.pass_s(12, 1), rel=0.1)
    assert measured.report.pass_s(1, 1) == pytest.approx(first.pass_s(1, 1), rel=0.1)


def test_new_durations_override_old_ones_of_other_sizes(noted: Noted) -> None:
    """Small passes measured on a busy machine do not raise the current cost of larger ones."""
    noting = noted(base_s=0.010)
    measured = StepCosts()
    measured.calibrate(noting, 64)
    for _ in range(500):
        measured.observe(1, 1, 0.020)
    for _ in range(300):
        noting.clock.now += 0.1
        measured.observe(4, 1, 0.010)
    assert measured.report.pass_s(4, 1) == pytest.approx(0.010, rel=0.03)
    assert all(a <= b for a, b in itertools.pairwise(measured.report.step_s))


def test_a_single_stall_changes_little(noted: Noted) -> None:
    noting = noted(base_s=0.01)
    measured = StepCosts()
    measured.calibrate(noting, 8)
    measured.observe(1, 1, 100.0)
    assert measured.step_s(1, 1) < 0.011


def test_small_changes_are_not_reported(noted: Noted) -> None:
    noting = noted(base_s=0.01)
    measured = StepCosts()
    measured.calibrate(noting, 8)
    reported = measured.report
    for _ in range(50):
        noting.clock.now += 1.0
        measured.observe(1, 1, 0.0101)
    assert measured.report is reported


def test_a_report_round_trips_over_the_wire() -> None:
    report = CostReport((1, 2, 8), (0.5, 0.5, 2.0), 0.25, 3.0)
    assert costs_from_proto(costs_to_proto(report)) == report


@pytest.mark.parametrize(
    "report",
    [
        CostReport((), (), 0.1, 1.0),
        CostReport((1, 2), (0.1,), 0.1, 1.0),
        CostReport((2, 1), (0.1, 0.2), 0.1, 1.0),
        CostReport((1, 2), (0.1, float("nan")), 0.1, 1.0),
        CostReport((1, 2), (-0.1, 0.1), 0.1, 1.0),
    ],
)
def test_inconsistent_reports_become_empty_ones(report: CostReport) -> None:
    assert costs_from_proto(costs_to_proto(report)) == CostReport()


def test_reports_with_invalid_numbers_become_empty_ones() -> None:
    read = costs_from_proto(costs_to_proto(CostReport((1,), (0.5,), -1.0, 0.0)))
    assert (read.row_s, read.mean_num_rows) == (0.0, 1.0)
