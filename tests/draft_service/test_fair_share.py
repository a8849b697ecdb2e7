"""Fair shares among targets, by counted tokens: no time is involved."""

from __future__ import annotations

from collections import Counter

from draft_service.fair_share import MAX_CLAIM, FairShare


def run(share: FairShare[str], work: Counter[str], capacity: int, cost: int = 1) -> Counter[str]:
    """One pass of `capacity` items, each of `cost` tokens. Removes them from `work`."""
    turns = share.turns([target for target, num in work.items() if num])
    served: Counter[str] = Counter()
    for _ in range(capacity):
        if (target := turns.take()) is None:
            break
        served[target] += 1
        work[target] -= 1
        if work[target]:
            turns.give_back(target, cost)
    share.settle(
        Counter({target: num * cost for target, num in served.items()}),
        [target for target, num in work.items() if num],
    )
    return served


def test_one_of_a_hundred_is_served_at_once() -> None:
    share: FairShare[str] = FairShare()
    assert run(share, Counter({"many": 100, "one": 1}), 8) == {"many": 7, "one": 1}


def test_equal_shares_and_what_one_leaves_goes_to_the_others() -> None:
    share: FairShare[str] = FairShare()
    assert run(share, Counter({"a": 100, "b": 100}), 8) == {"a": 4, "b": 4}
    share = FairShare()
    assert run(share, Counter({"a": 100, "b": 2, "c": 100}), 12) == {"a": 5, "b": 2, "c": 5}


def test_odd_passes_are_made_up_for() -> None:
    """A single row per pass: the targets alternate."""
    share: FairShare[str] = FairShare()
    work = Counter({"a": 50, "b": 50})
    served = [next(iter(run(share, work, 1))) for _ in range(10)]
    assert Counter(served) == {"a": 5, "b": 5}
    assert served[:2] in (["a", "b"], ["b", "a"])


def test_little_is_saved_up_while_all_work_is_done() -> None:
    """b needs little for long. Then it needs much: it gets its half, and at most MAX_CLAIM more."""
    share: FairShare[str] = FairShare()
    work = Counter({"a": 10_000})
    for _ in range(100):
        work["b"] = 1
        assert run(share, work, 8) == {"a": 7, "b": 1}
    work["b"] = 1000
    served = Counter[str]()
    for _ in range(50):
        served += run(share, work, 8)
    assert 200 <= served["b"] <= 200 + MAX_CLAIM / 2
    assert run(share, work, 8) == {"a": 4, "b": 4}


def test_who_comes_late_starts_level() -> None:
    """a alone has been served 800 tokens. It is not held back until b has had as many."""
    share: FairShare[str] = FairShare()
    work = Counter({"a": 10_000})
    for _ in range(100):
        run(share, work, 8)
    work["b"] = 1000
    assert run(share, work, 8) == {"a": 4, "b": 4}


def test_a_pause_between_rounds_costs_no_share() -> None:
    """b's generations wait together, are verified together, and come back: it gets its half."""
    share: FairShare[str] = FairShare()
    work, served, pause = Counter({"a": 100_000}), Counter[str](), 0
    for _ in range(500):
        if not work["b"] and (pause := pause + 1) > 3:
            work["b"], pause = 80, 0
        served += run(share, work, 16)
    assert 0.48 <= served["b"] / served.total() <= 0.52
