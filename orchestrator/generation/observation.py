"""Observation of generations: what a sampled generation reports to those who check or record it.

`orchestrator.traffic` records sampled generations, `orchestrator.audit` checks them. A generation
that is not sampled has no observer, and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from orchestrator.generation.preparation import PreparedTurn
from orchestrator.generation.state import GenerationState
from orchestrator.sessions import Lease
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.sampling.verify import VerifyOutcome

log = structlog.get_logger()


@dataclass(frozen=True)
class ObservedRound:
    """A round that was just committed after a context of `base_len` tokens.

    `outcome` covers the whole round, also tokens after a stop, which are not part of the output.
    `replica`: the target replica that verified it.
    """

    base_len: int
    proposal: Proposal | None
    result: VerifyResult
    outcome: VerifyOutcome
    replica: str | None


class GenerationObserver(Protocol):
    """Observer of one generation. Its methods run on the event loop and must be short."""

    @property
    def num_logprobs(self) -> int | None:
        """How many of the target's most likely tokens it needs in each result.

        With log-probabilities from the unprocessed logits, as for a request's `logprobs`. None:
        none.
        """

    def observe(self, committed: ObservedRound) -> None:
        """A round was committed."""

    def ended(self, state: GenerationState) -> None:
        """The generation has ended, also early. `state.finish` None: by an error or its client."""


# Returns the observers of a generation that begins; usually none.
MakeObservers = Callable[[PreparedTurn, Lease], Sequence[GenerationObserver]]


def unobserved(prepared: PreparedTurn, lease: Lease) -> Sequence[GenerationObserver]:
    """No observers."""
    return ()


class Observation:
    """The observers of one generation. One that raises is dropped: outputs do not depend on it."""

    def __init__(self, observers: Sequence[GenerationObserver]) -> None:
        self._observers = list(observers)

    @property
    def is_observed(self) -> bool:
        """Whether rounds have to be reported."""
        return bool(self._observers)

    def num_logprobs(self, requested: int | None) -> int | None:
        """How many log-probabilities to request from the target; the client wants `requested`."""
        wanted = [observer.num_logprobs for observer in self._observers]
        return max((num for num in (requested, *wanted) if num is not None), default=None)

    def observe(self, committed: ObservedRound) -> None:
        """Reports a committed round."""
        self._each(lambda observer: observer.observe(committed))

    def ended(self, state: GenerationState) -> None:
        """Reports the end."""
        self._each(lambda observer: observer.ended(state))

    def _each(self, report: Callable[[GenerationObserver], None]) -> None:
        for observer in tuple(self._observers):
            try:
                report(observer)
            except Exception:
                log.exception("observer_dropped", observer=type(observer).__name__)
                self._observers.remove(observer)
