"""Common part of both tiers' gRPC servicers: the model's description and the streams' arguments."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import grpc

from outrider.model_server.grammar_gate import GrammarGate
from outrider.model_server.load_engine import LoadedModel
from outrider.model_server.messages import Failure, FailureReason, ServiceStatistics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import Keyed, Scheduler
from outrider.model_server.stream import StreamPeer, serve_stream
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.replica import CostReport
from outrider.runtime.protobuf import costs_to_proto, model_answer, state_to_proto

Command = TypeVar("Command", bound=Keyed)
Result = TypeVar("Result", bound=Keyed)


class ModelServicer(Generic[Command, Result]):
    """Base class; one per service, on the event loop. Subclasses implement the tier's methods."""

    def __init__(
        self,
        scheduler: Scheduler[Command, Result],
        loaded: LoadedModel,
        statistics: Callable[[], ServiceStatistics],
        costs: Callable[[], CostReport],
        status: ReplicaStatus,
        watch: ReplicaTelemetry,
    ) -> None:
        self._scheduler = scheduler
        self._model = loaded.model
        self._grammars = loaded.grammars
        self._statistics = statistics
        self._costs = costs
        self._status = status
        self._watch = watch
        self._peer_ids = itertools.count(1)

    def _model_info(self, request: Any) -> dict[str, Any]:
        """Fields of a GetModelInfo response, without `load`."""
        return {
            "model": model_answer(self._model, with_token_hashes=request.with_token_hashes),
            "costs": costs_to_proto(self._costs()),
            "state": state_to_proto(self._status.state),
        }

    async def _serve(
        self,
        operation: str,
        peer: StreamPeer[Command, Result],
        frames: AsyncIterator[Any],
        context: grpc.aio.ServicerContext[Any, Any],
        to_frame: Callable[[Sequence[Result]], Any],
        requests: Callable[[Any], Iterator[tuple[Any, int]]],
    ) -> None:
        """Serves one stream. `requests`: those of a frame that expect an answer, with γ each."""
        watch = self._watch.stream(operation, requests)
        gate = GrammarGate(self._grammars, self._scheduler)
        await serve_stream(
            self._scheduler, peer, gate, frames, context, to_frame, self._costs, self._status, watch
        )


def add_failure(frame: Any, failure: Failure, reasons: Mapping[FailureReason, Any]) -> None:
    """Adds the failure to the errors of a response frame."""
    frame.errors.add(
        generation_id=failure.key.generation_id,
        reason=reasons[failure.reason],
        detail=failure.detail,
    )
