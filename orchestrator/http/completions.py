"""Endpoints that generate: run a request's generations, answer whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from orchestrator.admission.api_keys import ApiKeys, current_client
from orchestrator.api.generate import Generate
from orchestrator.api.request_telemetry import ApiTelemetry
from orchestrator.generation.output import Chunk, Result
from orchestrator.http.bodies import ChatBody, CompletionBody, parse_body
from orchestrator.http.calls import Call, encode_json
from orchestrator.http.errors import answer_of
from orchestrator.http.models import Models
from orchestrator.http.output import Envelope, Format, Piece, TokenTexts, is_cut_off
from orchestrator.http.pieces import Choice, joined
from orchestrator.http.requests import Plan, num_choices
from orchestrator.http.totals import metrics, running_usage, usage
from orchestrator.replicas.models import Limits
from outrider.errors import ClientStalled, OutriderError, Unavailable
from outrider.runtime.grpc_status import known_error
from outrider.runtime.write_watch import WriteWatch
from outrider.settings.services import OrchestratorConfig
from outrider.tokenizer import Tokenizer

# Generations of one request that run at a time; further ones start as they end.
_MAX_RUNNING = 32
# A longer body is parsed and checked in a thread.
_LONG_BODY_BYTES = 65_536
# More choices take over a millisecond to prepare.
_MANY_CHOICES = 16
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
        form: Callable[[TokenTexts, Plan], Format],
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
            model, plan = await self._planned(call, content)
            form = self._form(self._texts, plan)
            choices = [
                Choice(index, request, plan, form, self._texts, self._context.tokenizer)
                for index, request in enumerate(plan.requests)
            ]
            envelope = Envelope(form, call.request_id, model)
            kind = _Stream if plan.is_stream else _Whole
            await kind(self._resources, call, plan, form, envelope, choices).run()

    async def _planned(self, call: Call, content: bytes) -> tuple[str, Plan]:
        """Model name and plan of the body. A refusal is counted and logged as over gRPC."""
        limits, check = self._resources.use_case.limits(), self._context.encoding.check
        parse = functools.partial(parse_body, self._kind, content)
        try:
            body = await check(parse) if len(content) > _LONG_BODY_BYTES else parse()
            model = self._models.checked(body.model)
            plan = functools.partial(self._plan, body, limits, self._context.tokenizer)
            is_long = len(content) > _LONG_BODY_BYTES or num_choices(body) > _MANY_CHOICES
            return model, await check(plan) if is_long else plan()
        except OutriderError:
            async with self._resources.telemetry.of_request(call.headers):
                raise


class _Answer:
    """The generations of one request, and what is sent of them."""

    def __init__(
        self,
        resources: Resources,
        call: Call,
        plan: Plan,
        form: Format,
        envelope: Envelope,
        choices: Sequence[Choice],
    ) -> None:
        self._resources = resources
        self._call = call
        self._plan = plan
        self._form = form
        self._envelope = envelope
        self._choices = choices
        self._results: list[Result | None] = [None] * len(choices)
        self._watch = WriteWatch()

    async def run(self) -> None:
        raise NotImplementedError

    async def _take(self, choice: Choice, chunk: Chunk) -> None:
        raise NotImplementedError

    async def _generate_all(self) -> None:
        """Runs all generations, some at a time. The first error ends all."""
        if len(self._choices) == 1:
            await self._generate(self._choices[0])
            return
        # No more than the API key may have.
        most = current_client().quota.limits.streams
        room = asyncio.Semaphore(min(_MAX_RUNNING, most or _MAX_RUNNING))

        async def generate(choice: Choice) -> None:
            async with room:
                await self._generate(choice)

        async with asyncio.TaskGroup() as tasks:
            for choice in self._choices:
                tasks.create_task(generate(choice), name=f"choice {choice.index}")

    async def _generate(self, choice: Choice) -> None:
        resources, client = self._resources, current_client()
        async with (
            resources.telemetry.of_request(self._call.headers) as events,
            client.stream(),
            resources.use_case.generate(choice.request, client, events) as chunks,
            self._write_timeout(),
        ):
            choice.num_prompt_tokens = chunks.num_prompt_tokens
            async for chunk in chunks:
                ready_at = time.monotonic()
                self._results[choice.index] = chunk.result
                await self._take(choice, chunk)
                events.sent(chunk, ready_at)
        if is_cut_off(chunk.finish):
            raise Unavailable("the server is stopping; the output is incomplete")

    def _write_timeout(self) -> contextlib.AbstractAsyncContextManager[None]:
        return self._watch.timeout(self._resources.settings.write_timeout_s)

    def _totals(self) -> dict[str, Any]:
        results = [result for result in self._results if result is not None]
        request = self._choices[0].request
        max_gamma = request.max_gamma if request.gamma is None else request.gamma
        return {"usage": usage(results, self._plan.n), "metrics": metrics(results, max_gamma)}


class _Whole(_Answer):
    """Answer in one piece."""

    async def run(self) -> None:
        self._pieces: list[list[Piece]] = [[] for _ in self._choices]
        await self._generate_all()
        choices = [self._form.whole(joined(pieces)) for pieces in self._pieces]
        await self._call.answer(self._envelope.whole(choices, **self._totals()))

    async def _take(self, choice: Choice, chunk: Chunk) -> None:
        self._pieces[choice.index].append(choice.piece(chunk))


class _Stream(_Answer):
    """Answer as server-sent events, one per chunk of a generation.

    The response begins with the first chunk, so that an earlier error has its own status. Choices
    take turns: each waits until its event is written, so a slow client bounds all of them.
    """

    async def run(self) -> None:
        self._writing = asyncio.Lock()
        last: dict[str, Any] | None = None
        try:
            await self._generate_all()
            if self._plan.includes_usage:
                last = self._envelope.chunk(**self._totals())
        except Exception as error:
            if not self._call.has_begun or isinstance(known_error(error), ClientStalled):
                raise
            last = answer_of(error).body
        async with self._write_timeout():
            if last is not None:
                await self._send(last)
            await self._write(b"data: [DONE]\n\n", more=False)

    async def _take(self, choice: Choice, chunk: Chunk) -> None:
        has_begun, piece = choice.has_begun, choice.piece(chunk)
        if not has_begun and (opening := self._form.opening(choice.index)) is not None:
            await self._send(self._envelope.chunk(opening))
        is_last = not self._plan.includes_usage and None not in self._results
        fields = {"metrics": self._totals()["metrics"]} if is_last else {}
        if self._plan.has_running_usage:
            fields["usage"] = running_usage(choice.num_prompt_tokens, choice.num_tokens)
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
