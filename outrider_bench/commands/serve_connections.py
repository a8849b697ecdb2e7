"""Connections of `outrider bench serve`, over gRPC or HTTP, and what prompts are made of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc
import numpy as np

from outrider.cli.request import endpoints_of
from outrider.client.channel import Access, open_channel
from outrider.client.connection import call_failed
from outrider.errors import CallFailed, ConfigError, installs
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2, orchestrator_pb2
from outrider_bench.commands.serve_options import ServeOptions
from outrider_bench.loadtest.driver import LoadedOrchestrators, loaded_orchestrators, ordinary_ids
from outrider_bench.loadtest.plan import Conversation

if TYPE_CHECKING:
    import aiohttp


@contextlib.asynccontextmanager
async def connected(
    options: ServeOptions, planned: Sequence[Conversation]
) -> AsyncIterator[LoadedOrchestrators]:
    """The orchestrators of --http, otherwise of --endpoint. Raises ConfigError and CallFailed."""
    urls = _urls(options.http) if options.http is not None else []
    tokenizer = await _tokenizer(options)
    has_texts = all(job.text is not None for visit in planned for job in visit.jobs)
    if tokenizer is None and not has_texts and (options.chat or options.http is not None):
        raise ConfigError(
            "--tokenizer: random prompts over HTTP or in chats are made with it; or give texts: "
            "--texts, or a ShareGPT --trace"
        )
    async with contextlib.AsyncExitStack() as stack:
        if options.http is None:
            yield await _over_grpc(options, tokenizer, stack)
            return
        if not options.chat and any(visit.is_session for visit in planned):
            raise ConfigError("--turns, --trace: sessions over HTTP need --chat")
        yield await _over_http(urls, options.access, tokenizer, stack)


async def _tokenizer(options: ServeOptions) -> Tokenizer | None:
    if options.tokenizer is None:
        return None
    tokenizer = await asyncio.to_thread(Tokenizer.load, options.tokenizer)
    if tokenizer is None:
        raise ConfigError(f"--tokenizer: {options.tokenizer} has no tokenizer")
    return tokenizer


async def _over_grpc(
    options: ServeOptions, tokenizer: Tokenizer | None, stack: contextlib.AsyncExitStack
) -> LoadedOrchestrators:
    endpoints = endpoints_of(options.endpoint)
    channels = [
        await stack.enter_async_context(open_channel(endpoint, options.access, is_spread=True))
        for _ in range(options.connections)
        for endpoint in endpoints
    ]
    try:
        return await loaded_orchestrators(*channels, tokenizer=tokenizer)
    except grpc.aio.AioRpcError as error:
        raise await call_failed(error, endpoints[0], options.access) from error


async def _over_http(
    urls: Sequence[str],
    access: Access,
    tokenizer: Tokenizer | None,
    stack: contextlib.AsyncExitStack,
) -> LoadedOrchestrators:
    try:
        from outrider_bench.loadtest.http_sender import HttpSender, get_json, http_session
    except ImportError as error:
        raise ConfigError(f"--http: {error}; {installs('bench')}") from error

    try:
        session = await stack.enter_async_context(http_session(access))
    except OSError as error:
        raise ConfigError(f"--tls-ca, --tls-cert, --tls-key: {error}") from error
    cards = (await get_json(session, f"{urls[0]}/v1/models")).get("data") or [{}]
    name = cards[0].get("id")
    if not isinstance(name, str):
        raise CallFailed(f"GET {urls[0]}/v1/models: names no model")
    model = model_pb2.ModelInfo(name=name, max_context_len=cards[0].get("max_model_len") or 0)
    info = orchestrator_pb2.GetModelInfoResponse(target=model)
    if await _has_draft(session, urls[0]):
        info.draft.SetInParent()
    senders = [HttpSender(session, url, name) for url in urls]
    if tokenizer is None:
        return LoadedOrchestrators(senders, info, np.zeros(0, np.int64))
    model.vocab_size = tokenizer.max_token_id + 1
    model.token_hashes = tokenizer.vocabulary.to_bytes()
    if tokenizer.eos_token_id is not None:
        model.eos_token_ids.append(tokenizer.eos_token_id)
    return LoadedOrchestrators(senders, info, ordinary_ids(model), tokenizer)


async def _has_draft(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether a draft replica is connected; True for a service that does not report it."""
    from outrider_bench.loadtest.http_sender import get_json

    try:
        replicas = await get_json(session, f"{url}/v1/replicas")
    except CallFailed:
        return True
    listed = replicas.get("data", ())
    return any(each.get("tier") == "draft" and each.get("model") for each in listed)


def _urls(text: str) -> list[str]:
    """The URLs of --http, without a path. Raises ConfigError."""
    urls = [part.strip().rstrip("/").removesuffix("/v1") for part in text.split(",")]
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
            raise ConfigError(f"--http: {url!r} is not a URL such as http://127.0.0.1:8000")
    return urls
