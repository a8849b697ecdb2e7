"""`outrider bench shared-draft`: medians, shares and goals of runs."""

from __future__ import annotations

import pytest

from outrider_bench.commands.shared_draft import CASES, Shares, goals, shares_of, table


def run(way: str, rates: tuple[float, float], tokens: tuple[int, int]) -> dict[str, object]:
    return {"way": way, "tokens_per_s": rates, "draft_tokens": tokens}


def test_medians_of_the_runs_of_each_way() -> None:
    runs = [
        run("shared", (90.0, 40.0), (300, 100)),
        run("own", (100.0, 50.0), (0, 0)),
        run("shared", (80.0, 45.0), (310, 90)),
        run("own", (120.0, 40.0), (0, 0)),
        run("shared", (95.0, 10.0), (290, 110)),
        run("own", (100.0, 60.0), (0, 0)),
    ]
    found = shares_of(CASES[0], runs)
    assert found.shared_tokens_per_s == (90.0, 40.0)
    assert found.own_tokens_per_s == (100.0, 50.0)
    assert found.ratios == pytest.approx([0.9, 0.8])
    assert found.draft_share == pytest.approx((0.75, 0.25))


def test_goals() -> None:
    """As fast as alone while the draft has time; equal shares where both want more."""
    free = Shares(CASES[0].name, (4, 4), (97.0, 48.0), (100.0, 50.0), (0.6, 0.4))
    fair = Shares(CASES[2].name, (24, 12), (60.0, 55.0), (100.0, 80.0), (0.53, 0.47))
    met = goals([free, fair])
    assert [(goal.got, goal.is_met) for goal in met] == [(0.96, True), (0.47, True)]
    assert [goal.is_met for goal in goals([free])] == [True, None]
    assert table([free, fair]).row_count == 4
