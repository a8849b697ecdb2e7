"""The orchestrator put together: links to both tiers, store, tokenizer, server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator
from itertools import chain

import structlog

from orchestrator.admission.queue import AdmissionQueue
from orchestrator.admission.security import Security
from orchestrator.api.generate import Generate
from orchestrator.api.grpc_server import OrchestratorServicer
from orchestrator.api.metrics import OrchestratorMetrics, readings
from orchestrator.api.request_telemetry import RequestTelemetry
from orchestrator.generation.cleanup import Cleanup
from orchestrator.generation.context import GenerationContext, Timeouts
from orchestrator.generation.prompt_encoder import PromptEncoding
from orchestrator.replicas.discovery import discovering
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.models import check_shared, limits
from orchestrator.replicas.pairing import Pairing
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.replica_stream import FetchTokenHashes
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore, StoreOptions
from orchestrator.speculation.cost_book import CostBook
from outrider.client.channel import OpenChannel
from outrider.errors import ConfigError, Unavailable
from outrider.replica import CostReport
from outrider.runtime.grpc_server import REDIS, Server
from outrider.runtime.server_security import ServerProtection
from outrider.settings.services import OrchestratorConfig
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.telemetry import Telemetry, telemetry
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc

log = structlog.get_logger()

SERVICE_NAME = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
GENERATE = f"/{SERVICE_NAME}/Generate"
# What is left of running outputs after the operator's grace ends after the round under way.
STOP_GRACE_S = 2.0
# How long the end of calls that were cut off is waited for, while Redis stalls: leases would then
# stay until they lapse.
ENDINGS_WAIT_S = 5.0
# How long a start waits for a draft before serving without one: it joins when it comes.
DRAFT_START_TIMEOUT_S = 5.0
# So often it is said that no target is there.
TARGET_TOLD_S = 10.0
# Between two looks for a Redis that is away at the start.
REDIS_RETRY_S = 1.0
# Between two looks at whether Redis takes writes, once it serves.
REDIS_CHECK_S = 1.0


@contextlib.asynccontextmanager
async def serving(config: OrchestratorConfig) -> AsyncIterator[Server]:
    """Listens at once, serves (health) when store and target are there; stops on leaving.

    Raises ConfigError if port or Redis cannot be had, IncompatiblePair if the models do not fit.
    """
    security = Security(config, GENERATE)
    server = Server(
        [SERVICE_NAME],
        security.protection,
        connection_age_s=config.connection_age_s,
        connection_age_grace_s=config.connection_age_grace_s,
    )
    tokenizer = None
    if config.tokenizer:
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.tokenizer)
        if tokenizer is None:
            raise ConfigError(f"tokenizer: {config.tokenizer} has no tokenizer.json")
    store = SessionStore(config.redis, StoreOptions(session_ttl_s=config.session_ttl_s))
    pairing = Pairing(tokenizer, assume_same_vocabulary=config.assume_same_vocabulary)
    targets, drafts = _pools(config, pairing, security.open_channel)
    tiers = _tiers(config, targets, drafts, pairing, store, tokenizer)
    admission = AdmissionQueue(config.max_generations, config.max_waiting)
    admission.rooms = targets.rooms
    try:
        await server.start(config.host, config.port)
        await server.set_health(REDIS, False)
        async with telemetry("orchestrator", config.host, config) as told:
            # What it waits for at its start is told, too.
            meter = _meter(told, admission, tiers, security.protection)
            server.metrics_port = told.exposition.port
            server.services.awaited = "Redis"
            await _start(store, config.redis_wait_s)
            server.services.awaited = "a target replica"
            async with (
                security.following(lambda: _renew(targets, drafts)),
                discovering(config.redis, (targets, drafts)),
                targets.running(),
            ):
                await _settle_target(targets)
                told.exposition.model_name = targets.model.name if targets.model else ""
                async with drafts.running() if drafts is not None else contextlib.nullcontext():
                    await _settle_draft(drafts)
                    calls = RequestTelemetry(meter, told.tracing)
                    needs_redis = config.without_redis == "refuse"
                    current_limits = functools.partial(limits, config, targets, drafts)
                    use_case = Generate(tiers, current_limits, admission, needs_redis=needs_redis)
                    servicer = OrchestratorServicer(
                        use_case,
                        tiers,
                        current_limits,
                        calls,
                        write_timeout_s=config.write_timeout_s,
                    )
                    log.info("serving", port=server.port)
                    async with (
                        _following_redis(store, server),
                        _answering(server, servicer, use_case, tiers, config.stop_grace_s),
                    ):
                        yield server
    finally:
        await server.stop(0)
        await asyncio.to_thread(tiers.encoding.close)
        await store.close()


@contextlib.asynccontextmanager
async def _answering(
    server: Server,
    servicer: OrchestratorServicer,
    use_case: Generate,
    tiers: GenerationContext,
    stop_grace_s: float,
) -> AsyncIterator[None]:
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server.services)
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(_follow(tiers.targets, server), name="health")
        try:
            yield
        finally:
            following.cancel()
            await _stop(server, use_case, tiers.endings, stop_grace_s)


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
            endpoint, pairing.check_draft, on_change, open_channel
        ),
        config.draft_endpoints,
    )
    return targets, drafts


def _tiers(
    config: OrchestratorConfig,
    targets: ReplicaPool[TargetLink],
    drafts: ReplicaPool[DraftLink] | None,
    pairing: Pairing,
    store: SessionStore,
    tokenizer: Tokenizer | None,
) -> GenerationContext:
    timing = Timeouts(
        verdict_timeout_s=config.verdict_timeout_s,
        target_wait_s=config.target_wait_s,
        draft_wait_s=None if config.draft_wait_ms is None else config.draft_wait_ms / 1000,
    )
    costs = CostBook(
        target=targets.costs_of,
        draft=drafts.costs_of if drafts is not None else lambda _: CostReport(),
    )
    return GenerationContext(
        targets, drafts, pairing, store, tokenizer, PromptEncoding(), timing, costs
    )


def _meter(
    told: Telemetry,
    admission: AdmissionQueue,
    tiers: GenerationContext,
    protection: ServerProtection,
) -> OrchestratorMetrics | None:
    """None where nobody could read what is counted."""
    if not told.is_metered:
        return None
    meter = OrchestratorMetrics()
    tiers.costs.shared.verify_round_trip = meter.distributions[metrics.VERIFY_ROUND_TRIP]
    tiers.costs.shared.draft_round_trip = meter.distributions[metrics.DRAFT_ROUND_TRIP]
    told.exposition.source = lambda: chain(
        readings(meter, admission, tiers),
        protection.readings(admission.rejected, tiers.store.certificate_expires_at),
    )
    return meter


def _renew(targets: ReplicaPool[TargetLink], drafts: ReplicaPool[DraftLink] | None) -> None:
    targets.renew()
    if drafts is not None:
        drafts.renew()


async def _start(store: SessionStore, wait_s: float) -> None:
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            return await store.start()
        except Unavailable as error:
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"redis_url: {error}") from error
            log.warning("waiting_for_redis", why=str(error))
            await asyncio.sleep(REDIS_RETRY_S)


async def _settle_target(targets: ReplicaPool[TargetLink]) -> None:
    """However long it takes; raises where all were refused."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TARGET_TOLD_S):
                return await targets.settled()
        conditions = {link.endpoint: link.condition for link in targets.links.values()}
        log.warning("waiting_for_target", replicas=conditions or "none is known")


async def _settle_draft(drafts: ReplicaPool[DraftLink] | None) -> None:
    if drafts is None:
        return
    try:
        async with asyncio.timeout(DRAFT_START_TIMEOUT_S):
            await drafts.settled()
    except (TimeoutError, ConfigError) as error:
        log.warning("serving_without_draft", why=str(error) or "no draft replica answers")


async def _follow(targets: ReplicaPool[TargetLink], server: Server) -> None:
    """Keeps health: without a target no call can be answered, without drafts all can."""
    while True:
        is_served = targets.has_any
        await server.set_serving(is_served)
        while targets.has_any == is_served:
            await targets.change()


@contextlib.asynccontextmanager
async def _following_redis(store: SessionStore, server: Server) -> AsyncIterator[None]:
    """Keeps its health name and the metric, also where no call asks for anything.

    It does not touch readiness: all orchestrators have one Redis, and would be gone together.
    """

    async def follow() -> None:
        while True:
            await server.set_health(REDIS, await store.takes_writes())
            await asyncio.sleep(REDIS_CHECK_S)

    await server.set_health(REDIS, not store.is_away)
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follow(), name="redis health")
        try:
            yield
        finally:
            following.cancel()


async def _stop(server: Server, use_case: Generate, endings: Cleanup, grace_s: float) -> None:
    """What calls leave behind is over before the links and the store are closed."""
    stopping = asyncio.create_task(server.stop(grace_s + STOP_GRACE_S))
    await asyncio.wait([stopping], timeout=grace_s)
    use_case.stop()
    await stopping
    await endings.done(ENDINGS_WAIT_S)
