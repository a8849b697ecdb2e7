"""The target client: which error a failed generation reports."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.replicas.target_client import TargetLink
from outrider.errors import InternalError
from outrider.v1 import target_pb2, target_pb2_grpc
from tests.orchestrator.replicas.test_circuit_breaker import linked, opened_at

INTERNAL = target_pb2.RowError.REASON_INTERNAL
KV_FULL = target_pb2.RowError.REASON_KV_FULL


class Failing(target_pb2_grpc.TargetServiceServicer):
    """Fails every verify request, and then a later one of the same generation, with other errors.

    So does a replica that has closed the generation when further requests arrive.
    """

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> target_pb2.TargetServiceGetModelInfoResponse:
        return target_pb2.TargetServiceGetModelInfoResponse()

    async def Verify(self, request_iterator: Any, context: Any) -> None:
        async for frame in request_iterator:
            for row in frame.rows:
                errors = [
                    target_pb2.RowError(
                        generation_id=row.generation_id, reason=reason, detail=detail
                    )
                    for reason, detail in ((INTERNAL, "the first"), (KV_FULL, "a later one"))
                ]
                await context.write(target_pb2.VerifyResponse(errors=errors))


async def test_errors_after_a_generation_failed_are_ignored() -> None:
    """Its later requests fail with its first error, and the circuit breaker counts one failure."""
    add = target_pb2_grpc.add_TargetServiceServicer_to_server
    async with linked(Failing(), TargetLink, add) as link:
        handle = opened_at(link)
        for _ in range(2):
            with pytest.raises(InternalError, match="the first"):
                await handle.reply(None, 60.0)
            handle.send_verify(0, [1, 2], None)
        assert link.breaker._num_failures == 1
        handle.close(keep=False)
