"""Several draft models that all serve: each generation uses the fastest."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from orchestrator.replicas.draft_choice import FastestDraft
from orchestrator.speculation.acceptance import AcceptanceModel
from orchestrator.speculation.draft_speed import DraftSpeed
from outrider.draft_rollout import Role
from outrider.errors import ConfigError
from outrider.replica import CostReport
from outrider.settings.draft_canary import DraftCanarySettings

SMALL, LARGE = "small", "large"
TARGET = CostReport((1, 17), (0.02, 0.03))


class Drafts:
    """Two draft models, with a target pass of 20 ms."""

    def __init__(self, share: float = 0.1) -> None:
        self.replicas = {SMALL: 1, LARGE: 2}
        self.step_s: dict[str, float | None] = {SMALL: 0.001, LARGE: 0.008}
        self.acceptance = {SMALL: AcceptanceModel(), LARGE: AcceptanceModel()}
        self.choice = FastestDraft(
            lambda: self.replicas,
            DraftCanarySettings(draft_choice="fastest", draft_canary_share=share),
            self._speed,
            self.acceptance.__getitem__,
            draw=random.Random(0).random,
        )

    def _speed(self, revision: str) -> DraftSpeed | None:
        step_s = self.step_s[revision]
        return None if step_s is None else DraftSpeed(TARGET, CostReport((1,), (step_s,)), 0.5)

    def accept(self, revision: str, num_accepted: int) -> None:
        """Fifty rounds of eight draft tokens."""
        for _ in range(50):
            is_rejected = num_accepted < 8
            self.acceptance[revision].observe(8, num_accepted, is_rejected=is_rejected)

    def assigned(self, num: int = 400) -> Counter[str]:
        return Counter(self.choice.assign().revision for _ in range(num))


@pytest.mark.parametrize(
    ("num_accepted", "expected"),
    [
        ({SMALL: 2, LARGE: 2}, SMALL),  # as good and cheaper
        ({SMALL: 0, LARGE: 6}, LARGE),  # dearer, and so much better
    ],
)
def test_generations_use_the_draft_of_most_expected_tokens_per_second(
    num_accepted: dict[str, int], expected: str
) -> None:
    drafts = Drafts(share=0.0)
    for revision, num in num_accepted.items():
        drafts.accept(revision, num)
    assert drafts.assigned(20) == {expected: 20}


def test_a_share_of_the_generations_tries_all() -> None:
    """Half of a tenth get the slower one. Six standard deviations: wrong with probability 2e-9."""
    drafts = Drafts()
    drafts.accept(SMALL, 4)
    drafts.accept(LARGE, 4)
    num = drafts.assigned(4000)[LARGE]
    assert abs(num - 200) < 6 * (4000 * 0.05 * 0.95) ** 0.5
    tried = [drafts.choice.assign() for _ in range(400)]
    assert {one.revision for one in tried if one.is_compared} == {SMALL, LARGE}


def test_a_draft_without_measured_costs_is_tried_first() -> None:
    drafts = Drafts(share=0.0)
    drafts.step_s[LARGE] = None
    assert drafts.assigned(10) == {LARGE: 10}


def test_the_only_connected_draft_is_used() -> None:
    drafts = Drafts()
    drafts.replicas = {LARGE: 1}
    assert drafts.assigned(10) == {LARGE: 10}
    drafts.replicas = {}
    assert drafts.assigned(10) == {"": 10}


def test_all_revisions_are_current_and_any_replaces_a_missing_one() -> None:
    drafts = Drafts(share=0.0)
    assert {drafts.choice.record.role(name) for name in (SMALL, LARGE)} == {Role.CURRENT}
    assignment = drafts.choice.assign()
    other = LARGE if assignment.revision == SMALL else SMALL
    assert drafts.choice.rank(assignment.revision, assignment) == 0
    assert drafts.choice.rank(other, assignment) == 1


def test_an_unknown_choice_is_refused_by_name() -> None:
    settings: dict[str, Any] = {"draft_choice": "best"}
    with pytest.raises(ConfigError, match="draft_choice: must be canary or fastest"):
        DraftCanarySettings(**settings).check_draft_canary()
