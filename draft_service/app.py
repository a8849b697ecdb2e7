"""Composition root of the draft service: engine, proposer, scheduler, gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from draft_service.grpc_server import DraftServicer
from draft_service.reencoding import load_reencoders
from draft_service.scheduler_worker import Proposer
from outrider.engine import DeviceThread
from outrider.model_server.lifecycle import MountedService, model_serving
from outrider.model_server.load_engine import LoadedModel
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import Scheduler
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig
from outrider.v1 import draft_pb2, draft_pb2_grpc

SERVICE_NAME = draft_pb2.DESCRIPTOR.services_by_name["DraftService"].full_name


@contextlib.asynccontextmanager
async def serving(config: DraftConfig) -> AsyncIterator[Server]:
    """Context of the running draft service; see `model_serving`.

    Raises ConfigError, too, if a target's tokenizer cannot be loaded or re-encoded.
    """
    targets = config.target_tokenizers
    reencoders = await asyncio.to_thread(load_reencoders, config.model_at_revision, targets)

    def mount(
        loaded: LoadedModel,
        device: DeviceThread,
        server: Server,
        status: ReplicaStatus,
        watch: ReplicaTelemetry,
    ) -> MountedService:
        proposer = Proposer(
            loaded.engine,
            max_gamma=config.max_gamma,
            max_step_tokens=config.max_step_tokens,
            max_branches=config.max_branches,
            idle_session_ttl_s=config.idle_session_ttl_s,
            prefix_cache=config.prefix_cache,
            reencoders=reencoders,
        )
        loaded.model.target_tokenizer_fingerprints.extend(reencoders)
        proposer.meter = watch.meter
        scheduler = Scheduler(proposer, device)
        mounted = MountedService(
            scheduler,
            proposer.statistics,
            lambda: proposer.costs.report,
            proposer.health,
        )
        servicer = DraftServicer(
            scheduler, loaded, proposer.statistics, mounted.costs, status, watch
        )
        draft_pb2_grpc.add_DraftServiceServicer_to_server(servicer, server.services)
        return mounted

    async with model_serving(config, "draft", SERVICE_NAME, mount) as server:
        yield server
