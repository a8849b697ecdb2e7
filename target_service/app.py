"""Composition root of the target service: engine, verifier, scheduler, gRPC server."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from outrider.engine import DeviceThread
from outrider.model_server.lifecycle import MountedService, model_serving
from outrider.model_server.load_engine import LoadedModel
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import Scheduler
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.runtime.grpc_server import Server
from outrider.settings.services import TargetConfig
from outrider.v1 import target_pb2, target_pb2_grpc
from target_service.grpc_server import TargetServicer
from target_service.verifier import Verifier

# With passes of 25 ms or more, this exceeds the time from a verify result to the next request.
REJOIN_SHARE = 0.05
SERVICE_NAME = target_pb2.DESCRIPTOR.services_by_name["TargetService"].full_name


def serving(config: TargetConfig) -> AbstractAsyncContextManager[Server]:
    """Context of the running target service; see `model_serving`."""

    def mount(
        loaded: LoadedModel,
        device: DeviceThread,
        server: Server,
        status: ReplicaStatus,
        watch: ReplicaTelemetry,
    ) -> MountedService:
        verifier = Verifier(
            loaded.engine,
            max_gamma=config.max_gamma,
            max_step_tokens=config.max_step_tokens,
            idle_session_ttl_s=config.idle_session_ttl_s,
            prefix_cache=config.prefix_cache,
        )
        verifier.meter = watch.meter
        scheduler = Scheduler(verifier, device, rejoin_share=REJOIN_SHARE)
        mounted = MountedService(
            scheduler,
            verifier.statistics,
            lambda: verifier.costs.report,
            verifier.health,
        )
        servicer = TargetServicer(
            scheduler, loaded, verifier.statistics, mounted.costs, status, watch
        )
        target_pb2_grpc.add_TargetServiceServicer_to_server(servicer, server.services)
        return mounted

    return model_serving(config, "target", SERVICE_NAME, mount)
