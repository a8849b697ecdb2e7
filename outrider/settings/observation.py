"""Settings of recorded traffic and of the losslessness audit, a base class for `services`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outrider.sampling.params import MAX_LOGPROBS
from outrider.settings.fields import require, setting

MAX_PLANTED_BIAS = 0.5


@dataclass(frozen=True)
class ObservationSettings:
    """What the orchestrator records of its traffic, and what it checks. Both are off by default."""

    traffic_dir: str | None = setting(
        None,
        "directory to record sampled generations in, for outrider distill: token ids and the "
        "target's most likely tokens; unset: nothing is recorded",
    )
    traffic_share: float = setting(0.01, "share of the generations to record in traffic_dir")
    traffic_top_tokens: int = setting(
        MAX_LOGPROBS, "most likely tokens to record at each position of an output"
    )
    traffic_max_mb: int = setting(
        1024, "megabytes of recorded traffic to keep; the oldest files are deleted first"
    )
    traffic_max_age_h: float = setting(
        168.0, "hours after which a file of recorded traffic is deleted"
    )

    audit_share: float = setting(
        0.0,
        "share of the generations to audit: re-run without drafts in the background while no "
        "request waits, and compared; 0: none",
    )
    audit_tolerance: float | None = setting(
        None,
        "greatest difference of logits, between a generation and its re-run, that counts as "
        "rounding; unset: by the target's dtype",
    )
    audit_shows_tokens: bool = setting(
        False, "put the differing token ids into the evidence of failed audits"
    )
    audit_false_alarm_probability: float = setting(
        1e-4, "bound on the probability that the audit's tests raise a false alarm in a day"
    )
    audit_planted_bias: float = setting(
        0.0,
        "plant a defect to try the audit: acceptance probabilities are divided by 1 minus this; "
        "makes sampled outputs WRONG",
    )

    def check_observation(self) -> None:
        """Checks these settings. Raises ConfigError."""
        require(self.traffic_dir != "", "traffic_dir", "must be a directory, or unset")
        require(0 < self.traffic_share <= 1, "traffic_share", "must be in (0, 1]")
        is_allowed = 1 <= self.traffic_top_tokens <= MAX_LOGPROBS
        require(is_allowed, "traffic_top_tokens", f"must be 1 to {MAX_LOGPROBS}")
        require(self.traffic_max_mb >= 16, "traffic_max_mb", "must be 16 or more")
        require(self.traffic_max_age_h > 0, "traffic_max_age_h", "must be more than 0")
        require(0 <= self.audit_share <= 1, "audit_share", "must be in [0, 1]")
        tolerance = self.audit_tolerance
        is_allowed = tolerance is None or 0 <= tolerance < math.inf
        require(is_allowed, "audit_tolerance", "must be 0 or more")
        probability = self.audit_false_alarm_probability
        is_allowed = 0 < probability < 1
        require(is_allowed, "audit_false_alarm_probability", "must be between 0 and 1")
        is_allowed = 0 <= self.audit_planted_bias <= MAX_PLANTED_BIAS
        require(is_allowed, "audit_planted_bias", f"must be in [0, {MAX_PLANTED_BIAS}]")
        is_audited = self.audit_planted_bias == 0 or self.audit_share > 0
        require(is_audited, "audit_planted_bias", "needs audit_share")
