"""Model info of a tier (load and costs), requested from the tier itself."""

from __future__ import annotations

import grpc

from outrider.client.connection import SHORT_TIMEOUT_S
from outrider.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc


async def target_info(address: str) -> target_pb2.TargetServiceGetModelInfoResponse:
    """GetModelInfo of the target service. Raises AioRpcError."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        request = target_pb2.TargetServiceGetModelInfoRequest()
        response: target_pb2.TargetServiceGetModelInfoResponse = await stub.GetModelInfo(
            request, timeout=SHORT_TIMEOUT_S
        )
    return response


async def draft_info(address: str) -> draft_pb2.DraftServiceGetModelInfoResponse:
    """GetModelInfo of the draft service. Raises AioRpcError."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        request = draft_pb2.DraftServiceGetModelInfoRequest()
        response: draft_pb2.DraftServiceGetModelInfoResponse = await stub.GetModelInfo(
            request, timeout=SHORT_TIMEOUT_S
        )
    return response
