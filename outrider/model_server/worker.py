"""Base class of both tiers' workers: the part of a model service that runs on the device thread.

A step applies the queued commands, then runs one batch. An error fails only the generations that it
concerns, with a reason. Owns the sessions' KV. Every method is called on the device thread.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import structlog

from outrider.engine import Append, ServedEngine
from outrider.engine import Sequence as KVSequence
from outrider.engine.kv.pages import PAGE_SIZE
from outrider.engine.kv.sequence import pages_for
from outrider.errors import KVFull
from outrider.model_server.failure_policy import PassHealth
from outrider.model_server.messages import (
    Failure,
    FailureReason,
    ServiceStatistics,
    failure_reason,
)
from outrider.model_server.metrics import ModelServerMetrics
from outrider.model_server.scheduler import GenerationKey, Keyed
from outrider.model_server.session_table import LiveGeneration, SessionTable
from outrider.model_server.step_costs import StepCosts
from outrider.model_server.step_limits import StepLimits

log = structlog.get_logger()

# When a generation begins, 1/100 of the pages stays free, for running generations to grow into.
_MARGIN_SHARE = 100

# Our defects or the device's: what the generation left in the prefix cache may be wrong.
_DEFECTS = (FailureReason.INTERNAL, FailureReason.NON_FINITE)


@dataclass(frozen=True)
class Reclaimable:
    """KV that can be freed for another generation: `give_up` frees the sequences."""

    sequences: Collection[KVSequence]
    give_up: Callable[[], None]


CommandType = TypeVar("CommandType", bound=Keyed)
Result = TypeVar("Result", bound=Keyed)
State = TypeVar("State", bound=Keyed)
Work = TypeVar("Work", bound=Keyed)


class GenerationWorker(ABC, Generic[CommandType, Result, State, Work]):
    """`State`: the service's data of a generation. `Work`: a generation's part of a batch."""

    def __init__(
        self,
        engine: ServedEngine,
        costs: StepCosts,
        *,
        max_gamma: int,
        max_step_tokens: int,
        idle_session_ttl_s: float,
        prefix_cache: bool,
    ) -> None:
        self._engine = engine
        self._table: SessionTable[State] = SessionTable(
            engine.store, idle_session_ttl_s, prefix_cache=prefix_cache
        )
        self._limits = StepLimits(max_step_tokens, engine.info.max_step_rows, max_gamma)
        self._num_prefill_tokens = 0
        self._num_preempted = 0
        self._failures: list[Failure] = []  # of generations preempted since the last results
        self.costs = costs
        self.health = PassHealth()
        self.meter: ModelServerMetrics | None = None  # None: no metrics are collected

    def prepare(self, budget_s: float) -> None:
        """Calibrates the step costs, before the service starts."""
        self.costs.calibrate(self._engine, self._limits.max_tokens, budget_s)

    def _observe(self, appends: Sequence[Append], seconds: float) -> None:
        num_tokens = sum(len(append.token_ids) for append in appends)
        self.costs.observe(num_tokens, len(appends), seconds)
        if self.meter is not None:
            self.meter.observe_pass(len(appends), num_tokens, seconds)

    @property
    def num_open(self) -> int:
        return self._table.num_live

    def step(
        self, commands: Sequence[CommandType], is_interrupted: Callable[[], bool]
    ) -> list[Result | Failure]:
        """Applies the commands in order, then runs batches until there are results.

        Returns after the running batch if `is_interrupted`: new commands have arrived.
        """
        results: list[Result | Failure] = []
        for command in commands:
            if (context := self._context_of(command)) is not None:
                self._table.touch_prefix(context)
        for command in commands:
            try:
                results += self._execute(command)
            except Exception as error:
                self._failures.append(self._failed(command.key, error))
            results += self._take_failures()  # in order: a generation's first failure counts
        while self.has_work and not results:
            results += self._batch()
            if is_interrupted():
                break
        return results

    def _batch(self) -> list[Result | Failure]:
        work: Sequence[Work] = ()
        try:
            work = self._gather()
            results = self._advance(work) if work else []
        except Exception as raised:
            error = self._limits.after(raised)
            self.health.observe_error(error)
            keys = dict.fromkeys(part.key for part in work) or self._keys_with_work()
            results = [self._failed(key, error) for key in keys]
        return [*self._take_failures(), *results]

    @contextlib.contextmanager
    def _failing_alone(self, key: GenerationKey) -> Iterator[None]:
        """An error inside fails this generation only; its failure is among the next results."""
        try:
            yield
        except Exception as error:
            self._failures.append(self._failed(key, error))

    def _take_failures(self) -> list[Failure]:
        failures, self._failures = self._failures, []
        return failures

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether a batch would have work to do."""

    def tidy(self) -> None:
        """Frees expired sessions and checks the KV accounting; called while idle."""
        self._table.expire()
        self._engine.store.check_integrity()

    def statistics(self) -> ServiceStatistics:
        """Recent statistics; may be called on any thread."""
        return ServiceStatistics(**self._counts())

    def _counts(self) -> dict[str, Any]:
        return {
            "num_open_generations": self._table.num_live,
            "num_idle_sessions": self._table.num_idle,
            "num_opened_total": self._table.num_opened,
            "num_closed_total": self._table.num_closed,
            "kv_used_tokens": self._engine.store.used_tokens,
            "num_prefill_tokens_total": self._num_prefill_tokens,
            "num_prefix_queried_tokens_total": self._table.num_prefix_queried,
            "num_prefix_hit_tokens_total": self._table.num_prefix_hits,
        }

    def _take_over(self, session_id: str, epoch: int) -> list[Failure]:
        """Displaces the session's live generation unless its epoch is later."""
        live = self._table.find(session_id)
        if live is None or live.epoch > epoch:
            return []
        why = f"session {session_id} was taken over by epoch {epoch}"
        return [self._fail(live.state.key, FailureReason.DISPLACED, why)]

    def _opened(
        self,
        session_id: str,
        epoch: int,
        kept_epoch: int | None,
        max_len: int,
        started: tuple[int, float],
        state: State,
    ) -> LiveGeneration[State]:
        """Like SessionTable.open, but displaces a live generation of the session.

        Raises KVFull if as many generations are open as there are pages: each needs at least one.
        """
        self._failures += self._take_over(session_id, epoch)
        num_pages = self._engine.store.num_pages
        if self._table.num_live >= num_pages:
            raise KVFull(
                f"{num_pages} generations are open, as many as there are KV pages", num_pages + 1
            )
        return self._table.open(session_id, epoch, kept_epoch, max_len, started, state)

    def _reserve(
        self,
        live: LiveGeneration[State],
        num_tokens: int,
        *,
        context_len: int = 0,
        preempts: bool = True,
    ) -> int | None:
        """Like SessionTable.reserve, for the next pass; preempts less urgent generations if needed.

        A generation without pages does so only if it `preempts`, and leaves room for the running
        ones to grow. None: there is still no room, and this generation has failed.
        """
        if num_tokens <= live.sequence.max_len and not context_len:
            return 0
        # Rounded up to whole pages: most later requests then need no reservation.
        num_tokens = min(pages_for(num_tokens) * PAGE_SIZE, len(live.token_ids))
        margin = 0 if live.has_pages else self._margin(live, preempts=preempts)
        while True:
            try:
                return self._table.reserve(live, num_tokens, context_len=context_len, margin=margin)
            except KVFull as error:
                if not self._make_room(live, error, preempts=preempts):
                    self._num_preempted += live.has_pages
                    self._failures.append(self._failed(live.state.key, error))
                    return None

    def _margin(self, live: LiveGeneration[State], *, preempts: bool) -> int:
        """Pages to leave free: one for each running generation, at least 1/100 of all pages.

        Those it may preempt do not count: reserving room for them could block it indefinitely.
        """
        num_running = sum(
            other.has_pages and not self._may_preempt(live, other, preempts=preempts)
            for other in self._table.live_sessions()
        )
        if not num_running:
            return 0
        return max(num_running, self._engine.store.num_pages // _MARGIN_SHARE)

    def _make_room(self, live: LiveGeneration[State], error: KVFull, *, preempts: bool) -> bool:
        """Frees no more than is needed, and nothing if all of it is not enough."""
        reclaims = self._reclaims(live, preempts=preempts)
        chosen = self._engine.store.choose_victims([each.sequences for each in reclaims], error)
        for index in chosen or ():
            reclaims[index].give_up()
        return bool(chosen)

    def _reclaims(self, live: LiveGeneration[State], *, preempts: bool) -> list[Reclaimable]:
        """What can be freed for a generation, in this order: less urgent ones, the latest first.

        A preempted generation is recomputed: its orchestrator opens it again when there is room.
        The order is total, so the first one always continues and every one is served eventually.
        """
        others = [other for other in self._table.live_sessions() if other.has_pages]
        others = [other for other in others if self._may_preempt(live, other, preempts=preempts)]
        others.sort(key=lambda other: other.urgency, reverse=True)
        return [Reclaimable(self._sequences_of(o), partial(self._preempt, o)) for o in others]

    def _may_preempt(
        self, live: LiveGeneration[State], other: LiveGeneration[State], *, preempts: bool
    ) -> bool:
        return (live.has_pages or preempts) and other.urgency > live.urgency

    def _preempt(self, victim: LiveGeneration[State]) -> None:
        self._num_preempted += 1
        why = "preempted by a generation that is more urgent, began earlier, or keeps to its share"
        self._failures.append(self._fail(victim.state.key, FailureReason.KV_FULL, why))

    def _sequences_of(self, live: LiveGeneration[State]) -> Collection[KVSequence]:
        """All sequences that are freed with the generation."""
        return (live.sequence,)

    def _failed(self, key: GenerationKey, error: Exception) -> Failure:
        """Fails the generation with this error. After KV_LOST it stays open for a new context."""
        reason = failure_reason(error)
        if reason is FailureReason.KV_LOST:
            return Failure(key, reason, str(error))
        if reason not in _DEFECTS:
            return self._fail(key, reason, str(error))
        live = self._live_of(key)
        session_id = live.session_id if live is not None else None
        log.error("generation_failed", session_id=session_id, exc_info=error)
        failure = self._fail(key, reason, str(error))
        if live is not None:
            self._table.forget_prefix(live)
        return failure

    def _live_of(self, key: GenerationKey) -> LiveGeneration[State] | None:
        """Linear search; used only after a failure."""
        live = self._table.live_sessions()
        return next((each for each in live if each.state.key == key), None)

    def _fail(self, key: GenerationKey, reason: FailureReason, detail: str) -> Failure:
        self._close(key, keep=False)
        return Failure(key, reason, detail)

    @abstractmethod
    def _context_of(self, command: CommandType) -> npt.NDArray[Any] | None:
        """The tokens a generation begins with, if the command contains them."""

    @abstractmethod
    def _execute(self, command: CommandType) -> Sequence[Result | Failure]:
        """Applies one command. Returns other generations' failures; raises its own error."""

    @abstractmethod
    def _gather(self) -> Sequence[Work]:
        """The work of the next batch."""

    @abstractmethod
    def _keys_with_work(self) -> Collection[GenerationKey]:
        """A copy of the keys of the generations that `_gather` considers."""

    @abstractmethod
    def _advance(self, work: Sequence[Work]) -> list[Result | Failure]:
        """Runs one forward pass."""

    @abstractmethod
    def _close(self, key: GenerationKey, *, keep: bool) -> None:
        """Ends the generation if it is open."""
