"""Requests of a load test over gRPC: translates to and from protobuf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.runtime.protobuf import verification_to_proto
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from outrider_bench.loadtest.records import OK, Chunk, Record, Speculation
from outrider_bench.loadtest.requests import LoadRequest

# Timeout of unary calls.
SHORT_TIMEOUT_S = 10.0


class GrpcSender:
    """Sends requests over one gRPC channel."""

    keeps_sessions = True

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

    async def send(self, request: LoadRequest, record: Record, now_s: Callable[[], float]) -> str:
        """Sends the request and notes its messages; see `Sender`."""
        texts = []
        call: Any = self.stub.Generate(_message(request), timeout=request.options.timeout_s)
        try:
            async for message in call:
                _note_message(record, message, now_s())
                texts.append(message.text)
            record.status = OK if record.finish_reason else "NO_RESULT"
        except grpc.aio.AioRpcError as error:
            _note_failure(record, error)
        finally:
            call.cancel()  # leaving the loop does not cancel the call
        return "".join(texts)

    async def delete_session(self, session_id: str) -> None:
        """Deletes the session; see `Sender`."""
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        with contextlib.suppress(grpc.aio.AioRpcError):
            call: Any = self.stub.DeleteSession(request, timeout=SHORT_TIMEOUT_S)
            await call


def _message(request: LoadRequest) -> orchestrator_pb2.GenerateRequest:
    job, options = request.job, request.options
    message = orchestrator_pb2.GenerateRequest(
        gamma=options.gamma,
        lookahead=options.lookahead,
        fan_out=options.fan_out,
        session_id=request.session_id,
        create_session=bool(request.session_id),
    )
    if request.messages:
        for each in request.messages:
            message.chat.messages.add(role=each["role"], content=each["content"])
    elif job.text is not None:
        message.text = job.text
    else:
        message.token_ids.ids.extend(request.token_ids)
    if options.is_fast:
        message.durability = orchestrator_pb2.DURABILITY_FAST
    if options.verification is not None:
        message.verification = verification_to_proto(options.verification)
    if options.temperature is not None:
        message.sampling.temperature = options.temperature
    if job.priority is not None:
        message.priority = job.priority
    message.sampling.seed = request.seed
    message.sampling.max_tokens = job.max_tokens
    message.sampling.ignore_eos = options.ignores_eos
    return message


def _note_message(record: Record, message: orchestrator_pb2.GenerateResponse, at_s: float) -> None:
    """Adds a message of the stream, received at `at_s`, to the record."""
    if message.token_ids:
        record.chunks.append(Chunk(at_s, len(message.token_ids)))
    if message.HasField("result"):
        result, record.ended_s = message.result, at_s
        name = orchestrator_pb2.FinishReason.Name(result.finish_reason)
        record.finish_reason = name.removeprefix("FINISH_REASON_").lower()
        record.num_cached_tokens = result.usage.cached_tokens
        # Only the server knows the number of tokens of a text.
        record.prompt_len = record.prompt_len or result.usage.prompt_tokens
        record.speculation = _speculation(result.speculation)


def _note_failure(record: Record, error: grpc.aio.AioRpcError) -> None:
    """Adds a failure to the record: status, message and retry hint."""
    record.status = error.code().name
    record.detail = " ".join((error.details() or "").split())
    call: Any = error  # has the attributes that from_call reads
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the rich status has another code: not one of our servers
        return
    for detail in status.details if status is not None else ():
        hint = error_details_pb2.RetryInfo()
        if detail.Unpack(hint):
            record.retry_after_s = hint.retry_delay.ToTimedelta().total_seconds()


def _speculation(stats: orchestrator_pb2.SpeculationStats) -> Speculation:
    has_decision = stats.HasField("decision")
    return Speculation(
        num_drafts=stats.num_drafts,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
        num_rejected_tokens=stats.num_rejected_tokens,
        num_rounds=stats.num_rounds,
        num_lookahead_hits=stats.num_lookahead_hits,
        num_accepted_per_pos=tuple(stats.num_accepted_tokens_per_pos),
        num_rounds_per_gamma=tuple(stats.num_rounds_per_gamma),
        draft_wait_s=stats.draft_wait_s,
        verify_s=stats.verify_s,
        target_step_s=stats.target_step_s,
        num_rows=stats.decision.mean_num_rows if has_decision else None,
    )
