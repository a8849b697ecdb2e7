"""What every generation of an orchestrator works with, put together once at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.generation.cleanup import Cleanup
from orchestrator.generation.prompt_encoder import PromptEncoding
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pairing import Pairing
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore
from orchestrator.speculation.cost_book import CostBook
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timeouts:
    """How long a generation may wait for what."""

    verdict_timeout_s: float
    target_wait_s: float
    draft_wait_s: float | None


@dataclass(frozen=True)
class GenerationContext:
    """What a generation works with."""

    targets: ReplicaPool[TargetLink]
    drafts: ReplicaPool[DraftLink] | None
    pairing: Pairing
    store: SessionStore
    tokenizer: Tokenizer | None
    encoding: PromptEncoding
    timing: Timeouts
    costs: CostBook
    endings: Cleanup = field(default_factory=Cleanup)
