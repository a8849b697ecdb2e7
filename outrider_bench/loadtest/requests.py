"""Requests of a load test and their responses: translates to and from protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.runtime.protobuf import verification_to_proto
from outrider.sampling.params import Verification
from outrider.v1 import orchestrator_pb2
from outrider_bench.loadtest.plan import Job
from outrider_bench.loadtest.records import Chunk, Record, Speculation


@dataclass(frozen=True)
class RequestOptions:
    """Options of all requests of a variant. None: the server's default.

    `ignores_eos`: outputs have the requested length.
    """

    gamma: int | None = None
    lookahead: int | None = None
    fan_out: int | None = None
    temperature: float | None = 0.0
    verification: Verification | None = None
    is_fast: bool = False
    ignores_eos: bool = True
    timeout_s: float | None = None

    def request(
        self, job: Job, token_ids: Sequence[int], session_id: str, seed: int
    ) -> orchestrator_pb2.GenerateRequest:
        """The protobuf request. `token_ids` are unused if the job has a text."""
        request = orchestrator_pb2.GenerateRequest(
            gamma=self.gamma,
            lookahead=self.lookahead,
            fan_out=self.fan_out,
            session_id=session_id,
            create_session=bool(session_id),
        )
        if job.text is not None:
            request.text = job.text
        else:
            request.token_ids.ids.extend(token_ids)
        if self.is_fast:
            request.durability = orchestrator_pb2.DURABILITY_FAST
        if self.verification is not None:
            request.verification = verification_to_proto(self.verification)
        if self.temperature is not None:
            request.sampling.temperature = self.temperature
        if job.priority is not None:
            request.priority = job.priority
        request.sampling.seed = seed
        request.sampling.max_tokens = job.max_tokens
        request.sampling.ignore_eos = self.ignores_eos
        return request


def note_message(record: Record, message: orchestrator_pb2.GenerateResponse, at_s: float) -> None:
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


def note_failure(record: Record, error: grpc.aio.AioRpcError) -> None:
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
