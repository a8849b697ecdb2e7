"""Endpoints that generate: run a request's generations, answer whole or as a stream of events."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from orchestrator.admission.api_keys import ApiKeys, current_client
from orchestrator.api.generate import Generate
from orchestrator.api.request_telemetry import ApiTelemetry
from orchestrator.generation.output import Chunk, Result
from orchestrator.generation.validation import ValidRequest
from orchestrator.http.bodies import ChatBody, CompletionBody, parse_body
from orchestrator.http.calls import Call, encode_json
from orchestrator.http.errors import answer_of
from orchestrator.http.models import Models
from orchestrator.http.output import Envelope, Format, Piece, TokenTexts, is_cut_off, metrics, usage
from orchestrator.http.requests import Plan
from orchestrator.replicas.models import Limits
from outrider.errors import ClientStalled, Unavailable
from outrider.runtime.grpc_status import known_error
from outrider.runtime.write_watch import WriteWatch
from outrider.settings.services import OrchestratorConfig
from outrider.tokenizer import Tokenizer

# Generations of one request that run at a time; further ones start as they end.
_MAX_RUNNING = 32
# A longer body is parsed in a thread.
_LONG_BODY_BYTES = 65_536
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise collect events before it passes them on.
    (b"x-accel-buffering", b"no"),
]

Body = TypeVar("Body", CompletionBody, ChatBody)


@dataclass(frozen=True)
class Resources:
    """What the endpoints use. `api_keys` None: no key is required."""

    use_case: Generate
    telemetry: ApiTelemetry
    api_keys: ApiKeys | None
    settings: OrchestratorConfig


class Completions(Generic[Body]):
    """Endpoint that generates. `kind`: its body; `plan` translates it."""

    def __init__(
        self,
        resources: Resources,
        models: Models,
        kind: type[Body],
        plan: Callable[[Body, Limits, Tokenizer | None], Plan],
        form: Callable[[TokenTexts, int | None], Format],
    ) -> None:
        self._resources = resources
        self._context = resources.use_case.context
        self._models = models
        self._kind: type[Body] = kind
        self._plan: Callable[[Body, Limits, Tokenizer | None], Plan] = plan
        self._form = form
        self._texts = TokenTexts(self._context.tokenizer)

    async def __call__(self, call: Call) -> None:
        content = await call.body()
        async with call.connected():
            parse = functools.partial(self._parsed, content, self._resources.use_case.limits())
            if len(content) > _LONG_BODY_BYTES:
                model, plan = await self._context.encoding.check(parse)
            else:
                model, plan = parse()
            form = self._form(self._texts, plan.num_logprobs)
            envelope = Envelope(form, call.request_id, model)
            if plan.is_stream:
                await _Stream(self._resources, call, plan, form, envelope).run()
            else:
                await _Whole(self._resources, call, plan, form, envelope).run()

    def _parsed(self, content: bytes, limits: Limits) -> tuple[str, Plan]:
        body = parse_body(self._kind, content)
        model = self._models.checked(body.model)
        return model, self._plan(body, limits, self._context.tokenizer)


class _Answer:
    """The generations of one request, and what is sent of them."""

    def __init__(
        self, resources: Resources, call: Call, plan: Plan, form: Format, envelope: Envelope
    ) -> None:
        self._resources = resources
        self._call = call
        self._plan = plan
        self._form = form
        self._envelope = envelope
        self._results: list[Result | None] = [None] * len(plan.requests)
        self._watch = WriteWatch()

    async def _generate_all(self) -> None:
        """Runs all generations, at most `_MAX_RUNNING` at a time. The first error ends all."""
        requests = self._plan.requests
        if len(requests) == 1:
            await self._generate(0, requests[0])
            return
        room = asyncio.Semaphore(_MAX_RUNNING)

        async def generate(index: int, request: ValidRequest) -> None:
            async with room:
                await self._generate(index, request)

        async with asyncio.TaskGroup() as tasks:
            for index, request in enumerate(requests):
                tasks.create_task(generate(index, request), name=f"choice {index}")

    async def _generate(self, index: int, request: ValidRequest) -> None:
        resources, client = self._resources, current_client()
        async with (
            resources.telemetry.of_request(self._call.headers) as events,
            client.stream(),
            resources.use_case.generate(request, client, events) as chunks,
            self._watch.timeout(resources.settings.write_timeout_s),
        ):
            async for chunk in chunks:
                ready_at = time.monotonic()
                self._results[index] = chunk.result
                await self._take(index, chunk)
                events.sent(chunk, ready_at)
        if is_cut_off(chunk.finish):
            raise Unavailable("the server is stopping; the output is incomplete")

    async def _take(self, index: int, chunk: Chunk) -> None:
        raise NotImplementedError

    def _totals(self) -> dict[str, Any]:
        results = [result for result in self._results if result is not None]
        gamma = self._plan.requests[0].gamma
        return {"usage": usage(results, self._plan.n), "metrics": metrics(results, gamma)}


class _Whole(_Answer):
    """Answer in one piece."""

    async def run(self) -> None:
        self._pieces: list[list[Chunk]] = [[] for _ in self._plan.requests]
        await self._generate_all()
        choices = [self._form.whole(self._joined(index)) for index in range(len(self._pieces))]
        await self._call.answer(self._envelope.whole(choices, **self._totals()))

    async def _take(self, index: int, chunk: Chunk) -> None:
        self._pieces[index].append(chunk)

    def _joined(self, index: int) -> Piece:
        chunks = self._pieces[index]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        return Piece(index, "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish)


class _Stream(_Answer):
    """Answer as server-sent events, one per chunk of a generation.

    The response begins with the first chunk, so that an earlier error has its own status. Choices
    take turns: each waits until its event is written, so a slow client bounds all of them.
    """

    async def run(self) -> None:
        num = len(self._plan.requests)
        self._offsets = [0] * num
        self._has_opened = [False] * num
        self._writing = asyncio.Lock()
        try:
            await self._generate_all()
            if self._plan.includes_usage:
                await self._send(self._envelope.chunk(**self._totals()))
        except Exception as error:
            if not self._call.has_begun:
                raise
            if isinstance(known_error(error), ClientStalled):
                self._call.abort()
                raise
            await self._send(answer_of(error).body)
        await self._write(b"data: [DONE]\n\n", more=False)

    async def _take(self, index: int, chunk: Chunk) -> None:
        # A choice that was cut off has no end: an error follows.
        finish = None if is_cut_off(chunk.finish) else chunk.finish
        piece = Piece(index, chunk.text, chunk.tokens, finish, self._offsets[index])
        self._offsets[index] += self._form.num_chars(piece)
        if not self._has_opened[index]:
            self._has_opened[index] = True
            if (opening := self._form.opening(index)) is not None:
                await self._send(self._envelope.chunk(opening))
        is_last = not self._plan.includes_usage and None not in self._results
        fields = {"metrics": self._totals()["metrics"]} if is_last else {}
        await self._send(self._envelope.chunk(self._form.delta(piece), **fields))

    async def _send(self, event: Mapping[str, Any]) -> None:
        await self._write(f"data: {encode_json(event)}\n\n".encode(), more=True)

    async def _write(self, content: bytes, *, more: bool) -> None:
        async with self._writing:
            with self._watch.writing():
                if not self._call.has_begun:
                    await self._call.send(
                        {"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS}
                    )
                await self._call.send(
                    {"type": "http.response.body", "body": content, "more_body": more}
                )
