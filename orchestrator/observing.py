"""Observation of an orchestrator's generations, as the settings ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from orchestrator.generation.observation import GenerationObserver
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.sessions import Lease
from orchestrator.traffic.record import ModelNames
from orchestrator.traffic.recorder import NO_RECORDS, TrafficRecorder
from outrider.settings.observation import ObservationSettings
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.exposition import Reading

if TYPE_CHECKING:
    from outrider.v1 import model_pb2


class Observing:
    """What observes this orchestrator's generations. `model` returns the target's ModelInfo.

    Raises ConfigError if the directory of recorded traffic cannot be used.
    """

    def __init__(
        self, settings: ObservationSettings, model: Callable[[], model_pb2.ModelInfo | None]
    ) -> None:
        self._model = model
        self._traffic = (
            TrafficRecorder(settings, self._names) if settings.traffic_dir is not None else None
        )

    def _names(self) -> ModelNames:
        model = self._model()
        assert model is not None, "a target was connected"
        return ModelNames(model.model_fingerprint, model.tokenizer_fingerprint)

    def observers(self, prepared: PreparedTurn, lease: Lease) -> Sequence[GenerationObserver]:
        """Observers of a generation that begins; usually none."""
        return () if self._traffic is None else self._traffic.observers(prepared, lease)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Does the observers' background work for the block."""
        async with contextlib.AsyncExitStack() as stack:
            if self._traffic is not None:
                await stack.enter_async_context(self._traffic.running())
            yield

    def readings(self) -> Iterator[Reading]:
        """Yields the metrics; may be called on any thread."""
        records = self._traffic.records if self._traffic is not None else NO_RECORDS
        yield Reading.by(metrics.TRAFFIC_RECORDS, dict(records))
