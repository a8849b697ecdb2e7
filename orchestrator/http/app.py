"""Endpoints of HTTP and the application that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from orchestrator.http.bodies import ChatBody, CompletionBody
from orchestrator.http.calls import Api, Call
from orchestrator.http.completions import Completions, Resources
from orchestrator.http.models import Models
from orchestrator.http.output import ChatFormat, CompletionFormat
from orchestrator.http.page import REPLICAS, Replicas, page_files
from orchestrator.http.requests import chat_plan, completion_plan
from orchestrator.http.tokens import Tokens
from outrider import __version__
from outrider.errors import Unavailable

MODELS = "/v1/models"
# Probes have no keys; a version is no secret. The page's files have no data.
_OPEN_PATHS = ("/health", "/version")


# Body and content type of /metrics for an Accept header. Takes milliseconds; on any thread.
Scrape = Callable[[str], tuple[bytes, str]]


def http_app(resources: Resources, scrape: Scrape) -> ASGIApp:
    """The application, by the settings in `resources`."""
    use_case = resources.use_case
    models = Models(use_case.context.targets, resources.settings.served_names, use_case.limits)
    plain = _Plain(resources, models, scrape)
    completions = Completions(resources, models, CompletionBody, completion_plan, CompletionFormat)
    chat = Completions(resources, models, ChatBody, chat_plan, ChatFormat)
    tokens = Tokens(resources, models)
    origins = resources.settings.allowed_origins
    page = {("GET", file.path): file for file in page_files()}
    api = Api(
        {
            **page,
            ("GET", REPLICAS): Replicas(use_case.context),
            ("GET", "/health"): plain.health,
            ("GET", "/version"): plain.version,
            ("GET", "/metrics"): plain.metrics,
            ("GET", MODELS): plain.models,
            ("GET", f"{MODELS}/"): plain.model,
            ("POST", "/v1/completions"): completions,
            ("POST", "/v1/chat/completions"): chat,
            ("POST", "/tokenize"): tokens.tokenize,
            ("POST", "/detokenize"): tokens.detokenize,
        },
        resources.api_keys,
        [*_OPEN_PATHS, *(path for _, path in page)],
        origins,
        resources.settings.http_read_timeout_s,
    )
    if not origins:
        return api
    return CORSMiddleware(
        api,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


class _Plain:
    """Endpoints that generate nothing."""

    def __init__(self, resources: Resources, models: Models, scrape: Scrape) -> None:
        self._context = resources.use_case.context
        self._models = models
        self._scrape = scrape

    async def health(self, call: Call) -> None:
        """200 while a target is connected, otherwise 503."""
        if not self._context.targets.has_any:
            raise Unavailable("no target replica is connected")
        await call.answer({"status": "ok"})

    async def version(self, call: Call) -> None:
        await call.answer({"version": __version__})

    async def metrics(self, call: Call) -> None:
        accept = call.headers.get("accept", "")
        content, content_type = await asyncio.to_thread(self._scrape, accept)
        await call.respond(content, content_type)

    async def models(self, call: Call) -> None:
        await call.answer({"object": "list", "data": self._models.cards()})

    async def model(self, call: Call) -> None:
        # Names may contain slashes.
        name = self._models.checked(call.scope["path"].removeprefix(f"{MODELS}/"))
        cards = self._models.cards()
        await call.answer(next(card for card in cards if card["id"] == name))
