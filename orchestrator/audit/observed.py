"""Observer of an audited generation: what its re-run is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.generation.observation import ObservedRound
from orchestrator.generation.state import FinishReason, GenerationState
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.support import Support

Floats = npt.NDArray[np.float64]

# Positions of an output that are kept and compared, from its start. A kept position has at most
# 1 kB, so a generation has at most 1 MB.
MAX_POSITIONS = 1_024


class VerifiedPosition(NamedTuple):
    """The target's probabilities that a draft token was verified with.

    `target_probs` float64 [k]: on the draft's support; `tail_mass`: outside it.
    """

    support: Support
    target_probs: Floats
    tail_mass: float


@dataclass
class ObservedGeneration:
    """Observer that keeps a generation for its re-run. `finished` gets it once, if it has drafts.

    `positions`: by index in the context, of emitted tokens whose draft token had a support.
    `replicas`: targets that verified it.
    """

    session_id: str
    client: str
    finished: Callable[[ObservedGeneration], None]
    params: SamplingParams = field(default_factory=SamplingParams)
    verification: Verification = Verification.REJECTION
    prompt_len: int = 0
    token_ids: list[int] = field(default_factory=list)
    positions: dict[int, VerifiedPosition] = field(default_factory=dict)
    replicas: set[str] = field(default_factory=set)
    num_draft_tokens: int = 0
    num_logprobs: int | None = None

    @property
    def method(self) -> str:
        """Verification method, or greedy: at temperature 0 all methods are the same."""
        return "greedy" if self.params.greedy else self.verification.value

    def observe(self, committed: ObservedRound) -> None:
        """Keeps the probabilities of positions that the round has emitted a token at."""
        if committed.replica is not None:
            self.replicas.add(committed.replica)
        proposal = committed.proposal
        if proposal is None:
            return
        self.num_draft_tokens += len(proposal.token_ids)
        if proposal.supports is None or len(self.positions) >= MAX_POSITIONS:
            return
        num_emitted = committed.outcome.num_accepted + 1
        result = committed.result
        for i, support in enumerate(proposal.supports[:num_emitted]):
            self.positions[committed.base_len + i] = VerifiedPosition(
                support, result.support_probs[i], float(result.tail_mass[i])
            )

    def ended(self, state: GenerationState) -> None:
        """Passes the generation on if it ended by itself and used drafts."""
        is_finished = state.finish is not None and state.finish.reason is not FinishReason.CANCELLED
        if not is_finished or not self.num_draft_tokens:
            return
        self.params, self.verification = state.params, state.verification
        self.prompt_len = state.prompt_len
        self.token_ids = state.token_ids[: state.prompt_len + MAX_POSITIONS]
        self.finished(self)
