"""Dependencies shared by all generations of an orchestrator, created once at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.generation.cleanup import Cleanup
from orchestrator.generation.observation import MakeObservers, unobserved
from orchestrator.generation.prompt_encoder import PromptEncoding
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pairing import Pairing
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.rollout import DraftRollout
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore
from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.output_pool import OutputPool
from outrider.grammar import GrammarCompiler
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timeouts:
    """Maximum waiting times of a generation, in seconds."""

    verify_timeout_s: float
    """For a verify result."""
    target_wait_s: float
    """For a target replica."""
    draft_wait_s: float | None
    """For a proposal; None: chosen for each round."""


@dataclass(frozen=True)
class GenerationContext:
    """Replica pools, session store, tokenizer and settings that a generation uses."""

    targets: ReplicaPool[TargetLink]
    drafts: ReplicaPool[DraftLink] | None
    pairing: Pairing
    store: SessionStore
    tokenizer: Tokenizer | None
    encoding: PromptEncoding
    timeouts: Timeouts
    costs: CostBook
    rollout: DraftRollout | None = None
    grammars: GrammarCompiler | None = None
    """None: the tokenizer is none of which grammars can be made."""
    has_lookup: bool = False
    """Whether prompt lookup is on."""
    past_outputs: OutputPool | None = None
    """Past outputs that prompt lookup searches; None: none."""
    cleanup: Cleanup = field(default_factory=Cleanup)
    observers: MakeObservers = unobserved
    planted_bias: float = 0.0
    """Of `verify_proposal`: not 0 only to try the audit."""
