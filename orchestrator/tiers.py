"""What every generation of an orchestrator works with, put together once at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.cost_book import CostBook
from orchestrator.draft_link import DraftLink
from orchestrator.encoding import PromptEncoding
from orchestrator.endings import Endings
from orchestrator.pairing import Pairing
from orchestrator.pool import ReplicaPool
from orchestrator.store import SessionStore
from orchestrator.target_link import TargetLink
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timing:
    """How long a generation may wait for what."""

    verdict_timeout_s: float
    target_wait_s: float
    draft_wait_s: float | None


@dataclass(frozen=True)
class Tiers:
    """What a generation works with."""

    targets: ReplicaPool[TargetLink]
    drafts: ReplicaPool[DraftLink] | None
    pairing: Pairing
    store: SessionStore
    tokenizer: Tokenizer | None
    encoding: PromptEncoding
    timing: Timing
    costs: CostBook
    endings: Endings = field(default_factory=Endings)
