"""The orchestrator put together: links to both tiers, store, tokenizer, server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog

from orchestrator.draft_link import DraftLink
from orchestrator.generation import Tiers, Timing
from orchestrator.link import running
from orchestrator.rates import PairCosts
from orchestrator.request import Limits
from orchestrator.server import OrchestratorServicer
from orchestrator.store import SessionStore, StoreOptions
from orchestrator.target_link import TargetLink
from outrider.config import OrchestratorConfig
from outrider.costs import CostReport
from outrider.errors import ConfigError, IncompatiblePair, Unavailable
from outrider.server import Server
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc

log = structlog.get_logger()

SERVICE_NAME = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
# Running outputs may finish for so long at a stop; then they end after their round under way.
STOP_GRACE_S = 2.0
# How long a start waits for a draft before serving without one: it joins when it comes.
DRAFT_START_TIMEOUT_S = 5.0


@contextlib.asynccontextmanager
async def serving(config: OrchestratorConfig) -> AsyncIterator[Server]:
    """Listens at once, serves (health) when store and target are there; stops on leaving.

    Raises ConfigError if port or Redis cannot be had, IncompatiblePair if the models do not fit.
    """
    server = Server([SERVICE_NAME])
    tokenizer = None
    if config.tokenizer:
        tokenizer = await asyncio.to_thread(Tokenizer.load, config.tokenizer)
        if tokenizer is None:
            raise ConfigError(f"tokenizer: {config.tokenizer} has no tokenizer.json")
    store = SessionStore(config.redis_url, StoreOptions(session_ttl_s=config.session_ttl_s))
    target = TargetLink(config.target_endpoint, _target_check(tokenizer))
    draft = None
    if config.draft_endpoint:
        draft = DraftLink(config.draft_endpoint, _draft_check(target))
    try:
        await server.start(config.host, config.port)
        await _start(store)
        async with running(target):
            await target.settled()
            async with running(draft):
                await _settle_draft(draft)
                limits = _limits(config, target, draft)
                timing = Timing(
                    verdict_timeout_s=config.verdict_timeout_s,
                    draft_wait_s=(
                        None if config.draft_wait_ms is None else config.draft_wait_ms / 1000
                    ),
                )
                costs = PairCosts(
                    target=lambda: target.costs,
                    draft=lambda: draft.costs if draft is not None else CostReport(),
                )
                tiers = Tiers(target, draft, store, tokenizer, timing, costs)
                servicer = OrchestratorServicer(tiers, limits, config.max_generations)
                orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(
                    servicer, server.services
                )
                async with asyncio.TaskGroup() as tasks:
                    following = tasks.create_task(_follow(target, server), name="health")
                    log.info("serving", port=server.port, max_gamma=limits.max_gamma)
                    try:
                        yield server
                    finally:
                        following.cancel()
                        await _stop(server, servicer)
    finally:
        await server.stop(0)
        await store.close()


async def _start(store: SessionStore) -> None:
    try:
        await store.start()
    except Unavailable as error:
        raise ConfigError(f"redis_url: {error}") from error


async def _settle_draft(draft: DraftLink | None) -> None:
    if draft is None:
        return
    try:
        async with asyncio.timeout(DRAFT_START_TIMEOUT_S):
            await draft.settled()
    except TimeoutError:
        log.warning("serving_without_draft", endpoint=draft.endpoint)


async def _follow(target: TargetLink, server: Server) -> None:
    """Keeps health: without the target no call can be answered, without the draft all can."""
    while True:
        is_connected = target.is_connected
        await server.set_serving(is_connected)
        while target.is_connected == is_connected:
            await target.change()


async def _stop(server: Server, servicer: OrchestratorServicer) -> None:
    stopping = asyncio.create_task(server.stop(2 * STOP_GRACE_S))
    await asyncio.wait([stopping], timeout=STOP_GRACE_S)
    servicer.stop_generations()
    await stopping


def _limits(config: OrchestratorConfig, target: TargetLink, draft: DraftLink | None) -> Limits:
    model = target.model
    assert model is not None, "the target is connected"
    max_gamma = min(config.max_gamma, model.max_gamma)
    if draft is not None and draft.model is not None:
        max_gamma = min(max_gamma, draft.model.max_gamma)
    return Limits(
        vocab_size=model.vocab_size,
        max_context_len=min(model.max_context_len, model.kv_capacity_tokens),
        eos_token_ids=tuple(model.eos_token_ids),
        gamma=None if config.gamma is None else min(config.gamma, max_gamma),
        max_gamma=max_gamma,
        lookahead=config.lookahead,
        fan_out=config.fan_out,
        default_max_tokens=config.default_max_tokens,
    )


ModelCheck = Callable[[model_pb2.ModelInfo], None]


def _target_check(tokenizer: Tokenizer | None) -> ModelCheck:
    served: list[model_pb2.ModelInfo] = []

    def check(model: model_pb2.ModelInfo) -> None:
        if tokenizer is not None and model.tokenizer_fingerprint != tokenizer.fingerprint:
            raise IncompatiblePair(
                f"the target {model.name} has tokenizer {_short(model.tokenizer_fingerprint)}, "
                f"this orchestrator {_short(tokenizer.fingerprint)}"
            )
        if served and model.model_fingerprint != served[0].model_fingerprint:
            raise IncompatiblePair(
                f"the target is {model.name} {_short(model.model_fingerprint)} now, and was "
                f"{served[0].name} {_short(served[0].model_fingerprint)}: restart the orchestrator"
            )
        if served and model.max_gamma < served[0].max_gamma:
            raise IncompatiblePair(
                f"the target takes {model.max_gamma} draft tokens now, and took "
                f"{served[0].max_gamma}: restart the orchestrator"
            )
        served[:] = [model]

    return check


def _draft_check(target: TargetLink) -> ModelCheck:
    def check(model: model_pb2.ModelInfo) -> None:
        theirs = target.model.tokenizer_fingerprint if target.model else ""
        if model.tokenizer_fingerprint != theirs:
            raise IncompatiblePair(
                f"draft and target do not share a tokenizer: the draft {model.name} has "
                f"{_short(model.tokenizer_fingerprint)}, the target {_short(theirs)}"
            )

    return check


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"
