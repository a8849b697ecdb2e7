"""Settings of the comparison of a new draft revision with the current one."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.fields import require, setting


@dataclass(frozen=True)
class DraftCanarySettings:
    """How an orchestrator tries a new draft revision (`orchestrator.replicas.rollout`).

    Or chooses among several that stay (`orchestrator.replicas.draft_choice`).
    """

    draft_choice: str = setting(
        "canary",
        "of several draft models: canary, a new one is compared and replaces the old one; fastest, "
        "all stay, and each generation uses the fastest (draft_canary_share of them a random one)",
    )
    draft_canary_share: float = setting(
        0.1,
        "share of generations that try a new draft revision, 0 to 0.5; 0: only operators promote",
    )
    draft_canary_margin: float = setting(
        0.03,
        "a new draft revision is promoted if its acceptance rate is lower by less than this",
    )
    draft_canary_min_generations: int = setting(
        20, "generations of each draft revision before one is promoted or rolled back"
    )

    def check_draft_canary(self) -> None:
        """Raises ConfigError."""
        require(
            self.draft_choice in ("canary", "fastest"), "draft_choice", "must be canary or fastest"
        )
        require(0 <= self.draft_canary_share <= 0.5, "draft_canary_share", "must be 0 to 0.5")
        require(0 < self.draft_canary_margin < 1, "draft_canary_margin", "must be between 0 and 1")
        require(
            self.draft_canary_min_generations >= 2,
            "draft_canary_min_generations",
            "must be 2 or more",
        )
