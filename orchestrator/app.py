"""Composition root of the orchestrator: replica pools, session store, tokenizer, gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import structlog

from orchestrator.admission.queue import AdmissionQueue
from orchestrator.admission.security import Security
from orchestrator.api.generate import STOP_GRACE_S, Generate
from orchestrator.api.grpc_server import OrchestratorServicer
from orchestrator.api.metrics import OrchestratorMetrics, readings
from orchestrator.api.request_telemetry import ApiTelemetry
from orchestrator.generation.cleanup import Cleanup
from orchestrator.generation.context import GenerationContext, Timeouts
from orchestrator.generation.prompt_encoder import PromptEncoding
from orchestrator.health import checking_redis, updating_health
from orchestrator.observing import Observing
from orchestrator.replicas.draft_choice import draft_assignment
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.models import check_shared, limits
from orchestrator.replicas.pairing import Pairing
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.replica_stream import FetchTokenHashes
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore, StoreOptions
from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.output_pool import OutputPool
from orchestrator.startup import reach_redis, settle_draft, settle_target
from outrider.client.channel import OpenChannel
from outrider.errors import ConfigError
from outrider.grammar import grammar_compiler
from outrider.redis.registry import Replica, Watcher
from outrider.redis.rollout_store import RolloutStore
from outrider.replica import CostReport
from outrider.runtime.grpc_server import REDIS, Server
from outrider.runtime.server_security import ServerProtection
from outrider.settings.redis_address import RedisAddress
from outrider.settings.services import OrchestratorConfig
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.exposition import Exposition
from outrider.telemetry.telemetry import Telemetry, telemetry
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc

if TYPE_CHECKING:
    from orchestrator.http.server import HttpServer

log = structlog.get_logger()

SERVICE_NAME = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
GENERATE = f"/{SERVICE_NAME}/Generate"
# Longest wait for the cleanup of cancelled calls while Redis stalls. After it, their leases remain
# until they expire.
CLEANUP_WAIT_S = 5.0


@contextlib.asynccontextmanager
async def serving(config: OrchestratorConfig) -> AsyncIterator[Server]:
    """Runs the orchestrator for the block. Its health is SERVING once Redis and a target are ready.

    Raises ConfigError if the port is in use or Redis is unreachable, IncompatiblePair if the models
    do not fit.
    """
    security = Security(config, GENERATE)
    server = Server(
        [SERVICE_NAME],
        security.protection,
        connection_age_s=config.connection_age_s,
        connection_age_grace_s=config.connection_age_grace_s,
    )
    admission = AdmissionQueue(config.max_generations, config.max_waiting)
    resources, observing = await _resources(config, security.open_channel, admission)
    admission.targets = resources.targets.candidates
    use_case = Generate(
        resources,
        functools.partial(limits, config, resources.targets, resources.drafts),
        admission,
        needs_redis=config.without_redis == "refuse",
    )
    pools = [pool for pool in (resources.targets, resources.drafts) if pool is not None]
    ports = contextlib.ExitStack()
    if resources.grammars is not None:
        ports.callback(resources.grammars.close)
    try:
        await server.start(config.host, config.port)
        await server.set_health(REDIS, False)
        async with telemetry(
            "orchestrator", config.host, config, has_http=config.http_port is not None
        ) as exporters:
            # Metrics are exposed during the start, too.
            meter = _meter(exporters, admission, resources, observing, security.protection)
            api_telemetry = ApiTelemetry(meter, exporters.tracing)
            server.metrics_port = exporters.exposition.port
            http = None
            if config.http_port is not None:
                from orchestrator.http.server import HttpServer

                scrape = exporters.exposition.answer
                http = HttpServer(config, use_case, api_telemetry, security.api_keys, scrape)
                ports.callback(http.close)
                server.http_port = http.port
            server.services.awaited = "Redis"
            await reach_redis(resources.store, config.redis_wait_s)
            server.services.awaited = "a target replica"
            async with (
                security.reloading(lambda: _renew(pools)),
                _discovering(config.redis, pools),
                _connected(config.redis, resources, exporters.exposition),
                checking_redis(resources.store, server),
                observing.running(),
                _answering(config, server, use_case, resources, observing, api_telemetry, http),
            ):
                yield server
    finally:
        await server.stop(0)
        ports.close()
        await asyncio.to_thread(resources.encoding.close)
        await resources.store.close()


@contextlib.asynccontextmanager
async def _connected(
    redis: RedisAddress, resources: GenerationContext, exposition: Exposition
) -> AsyncIterator[None]:
    """Connects to a target, and to a draft if one answers in time, for the block."""
    targets, drafts = resources.targets, resources.drafts
    async with targets.running():
        await settle_target(targets)
        exposition.model_name = targets.model.name if targets.model else ""
        async with contextlib.AsyncExitStack() as stack:
            if drafts is not None and resources.rollout is not None:
                await stack.enter_async_context(drafts.running())
                fingerprint = targets.model.model_fingerprint if targets.model else ""
                rollouts = RolloutStore(redis, fingerprint)
                await stack.enter_async_context(resources.rollout.running(rollouts))
                await settle_draft(drafts)
            yield


@contextlib.asynccontextmanager
async def _answering(
    config: OrchestratorConfig,
    server: Server,
    use_case: Generate,
    resources: GenerationContext,
    observing: Observing,
    api_telemetry: ApiTelemetry,
    http: HttpServer | None,
) -> AsyncIterator[None]:
    """Answers requests for the block, then ends the running ones within `stop_grace_s`."""
    servicer = OrchestratorServicer(
        use_case,
        resources,
        use_case.limits,
        api_telemetry,
        observing.auditor,
        write_timeout_s=config.write_timeout_s,
    )
    log.info("serving", port=server.port, http_port=server.http_port)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server.services)
    async with updating_health(resources.targets, server), _running(http):
        try:
            yield
        finally:
            await _stop(server, http, use_case, resources.cleanup, config.stop_grace_s)


def _running(http: HttpServer | None) -> contextlib.AbstractAsyncContextManager[None]:
    return contextlib.nullcontext() if http is None else http.running()


def _pools(
    config: OrchestratorConfig, pairing: Pairing, open_channel: OpenChannel
) -> tuple[ReplicaPool[TargetLink], ReplicaPool[DraftLink] | None]:

    async def check_target(model: model_pb2.ModelInfo, token_hashes: FetchTokenHashes) -> None:
        await pairing.check_target(model, token_hashes)
        check_shared(model, targets.models)

    targets = ReplicaPool(
        "target",
        lambda endpoint, on_change: TargetLink(endpoint, check_target, on_change, open_channel),
        config.target_endpoints,
    )
    if not config.draft_endpoint:
        return targets, None
    drafts = ReplicaPool(
        "draft",
        lambda endpoint, on_change: DraftLink(
            endpoint, pairing.check_draft, on_change, open_channel, pairing.paired_target
        ),
        config.draft_endpoints,
    )
    return targets, drafts


async def _resources(
    config: OrchestratorConfig, open_channel: OpenChannel, admission: AdmissionQueue
) -> tuple[GenerationContext, Observing]:
    """Resources of all generations, not connected yet, and what observes them.

    Raises ConfigError for `tokenizer` and `traffic_dir`.
    """
    tokenizer = None
    if config.tokenizer:
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.tokenizer, config.chat_template)
        if tokenizer is None:
            raise ConfigError(f"tokenizer: {config.tokenizer} has no tokenizer.json")
    grammars = await asyncio.to_thread(grammar_compiler, tokenizer, tries_first=True)
    pairing = Pairing(tokenizer, assume_same_vocabulary=config.assume_same_vocabulary)
    targets, drafts = _pools(config, pairing, open_channel)
    store = SessionStore(config.redis, StoreOptions(session_ttl_s=config.session_ttl_s))
    timeouts = Timeouts(
        verify_timeout_s=config.verify_timeout_s,
        target_wait_s=config.target_wait_s,
        draft_wait_s=None if config.draft_wait_ms is None else config.draft_wait_ms / 1000,
    )
    costs = CostBook(
        target=targets.costs_of,
        draft=drafts.costs_of if drafts is not None else lambda _: CostReport(),
    )
    rollout = None
    if drafts is not None:
        rollout = draft_assignment(config, targets, drafts, costs)
    observing = Observing(config, targets, lambda: admission.is_busy)
    context = GenerationContext(
        targets,
        drafts,
        pairing,
        store,
        tokenizer,
        PromptEncoding(),
        timeouts,
        costs,
        rollout,
        grammars,
        has_lookup=config.prompt_lookup,
        past_outputs=OutputPool(pool) if (pool := config.prompt_lookup_pool) else None,
        observers=observing.observers,
        planted_bias=config.audit_planted_bias,
    )
    return context, observing


def _meter(
    exporters: Telemetry,
    admission: AdmissionQueue,
    resources: GenerationContext,
    observing: Observing,
    protection: ServerProtection,
) -> OrchestratorMetrics | None:
    """Metrics of the orchestrator; None if they are not exported."""
    if not exporters.is_metered:
        return None
    meter = OrchestratorMetrics()
    resources.costs.shared.verify_round_trip = meter.distributions[metrics.VERIFY_ROUND_TRIP]
    resources.costs.shared.draft_round_trip = meter.distributions[metrics.DRAFT_ROUND_TRIP]
    exporters.exposition.source = lambda: chain(
        readings(meter, admission, resources),
        observing.readings(),
        protection.readings(admission.rejected, resources.store.certificate_expires_at),
    )
    return meter


def _renew(pools: Sequence[ReplicaPool[Any]]) -> None:
    for pool in pools:
        pool.renew()


@contextlib.asynccontextmanager
async def _discovering(
    redis: RedisAddress, pools: Sequence[ReplicaPool[Any]]
) -> AsyncIterator[None]:
    """Offers the registry's replicas to pools without a list of their own, for the block."""

    def watcher(pool: ReplicaPool[Any]) -> Watcher:
        def offer(replicas: list[Replica]) -> None:
            pool.offer({replica.address: replica.num_open_generations for replica in replicas})

        return Watcher(redis, pool.tier, offer)

    async with asyncio.TaskGroup() as tasks:
        watching = [
            tasks.create_task(watcher(pool).run(), name=f"{pool.tier} registry")
            for pool in pools
            if pool.is_discovered
        ]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()


async def _stop(
    server: Server, http: HttpServer | None, use_case: Generate, cleanup: Cleanup, grace_s: float
) -> None:
    """Ends all calls and their cleanup, before the pools and the store are closed."""
    stops = [asyncio.create_task(server.stop(grace_s + STOP_GRACE_S))]
    if http is not None:
        stops.append(asyncio.create_task(http.stop()))
    await asyncio.wait(stops, timeout=grace_s)
    use_case.stop()
    await asyncio.gather(*stops)
    await cleanup.wait(CLEANUP_WAIT_S)
