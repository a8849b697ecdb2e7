"""HTTP calls: endpoint, API key, request id, body, connection, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any

import structlog
from starlette.types import Message, Receive, Scope, Send

from orchestrator.admission.api_keys import ApiKeys
from orchestrator.api.request_telemetry import REQUEST_ID_KEY, request_id
from orchestrator.http.errors import ClientGone, Refused, answer_of
from outrider.runtime.grpc_options import MAX_REQUEST_BYTES
from outrider.settings.http import ANY_ORIGIN

encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Call:
    """One HTTP call. `headers`: names in lower case; they contain the request id.

    `body_timeout_s`: longest wait for the whole body.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_timeout_s: float) -> None:
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.headers[REQUEST_ID_KEY] = request_id(self.headers)
        self.scope = scope
        self.receive = receive
        self.has_begun = False
        self._send = send
        self._body_timeout_s = body_timeout_s
        self._id_header = (REQUEST_ID_KEY.encode(), self.headers[REQUEST_ID_KEY].encode("latin-1"))

    @property
    def request_id(self) -> str:
        return self.headers[REQUEST_ID_KEY]

    @property
    def peer(self) -> str:
        """The client's address, for the log."""
        host, port = self.scope.get("client") or ("unknown", 0)
        return f"{host}:{port}"

    async def send(self, message: Message) -> None:
        """Sends a message of ASGI, with the request id in the headers."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            message = {**message, "headers": [*message.get("headers", ()), self._id_header]}
        await self._send(message)

    async def body(self) -> bytes:
        """The request's body. Raises Refused if it is too large or late, ClientGone."""
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > MAX_REQUEST_BYTES:
                        raise Refused(f"the body has more than {MAX_REQUEST_BYTES} bytes", 413)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            why = f"the body was not received within {self._body_timeout_s:g} s"
            raise Refused(why, 408) from None

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Cancels the block when the client closes its connection. The body must have been read.

        Raises ClientGone then, in a group.
        """
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._gone(), name="connection")
            try:
                yield
            finally:
                watching.cancel()

    async def _gone(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        raise ClientGone

    async def answer(self, body: Any, status: int = 200, retry_after_s: int | None = None) -> None:
        """Sends a whole response in JSON."""
        content = encode_json(body).encode()
        await self.respond(content, "application/json", status, retry_after_s)

    async def respond(
        self, content: bytes, content_type: str, status: int = 200, retry_after_s: int | None = None
    ) -> None:
        """Sends a whole response."""
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(content)).encode()),
        ]
        if retry_after_s is not None:
            headers.append((b"retry-after", str(retry_after_s).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})

    def abort(self) -> None:
        """Closes the connection at once; what is not sent yet is dropped."""
        transport = self.scope["state"].get("transport")
        if transport is not None:
            transport.abort()


Endpoint = Callable[[Call], Awaitable[None]]


class Api:
    """ASGI application: finds a call's endpoint, checks its API key and answers errors.

    `api_keys` None: no key is required. `open_paths`: paths that need no key. `origins`: of other
    web pages that may send requests.
    """

    def __init__(
        self,
        endpoints: Mapping[tuple[str, str], Endpoint],
        api_keys: ApiKeys | None,
        open_paths: Collection[str],
        origins: Collection[str],
        body_timeout_s: float,
    ) -> None:
        """`endpoints`: by method and path; a longer path that ends in / has those below it, too."""
        self._endpoints = endpoints
        self._api_keys = api_keys
        self._open_paths = frozenset(open_paths)
        self._origins = frozenset(origins)
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        call = Call(scope, receive, send, self._body_timeout_s)
        structlog.contextvars.bind_contextvars(request_id=call.request_id)
        try:
            if scope["method"] == "POST":
                self._check_origin(call)
            if self._api_keys is not None and scope["path"] not in self._open_paths:
                self._api_keys.enter(call.headers.items(), scope["path"], call.peer)
            await self._endpoint(scope["method"], scope["path"])(call)
        except Exception as error:
            await _failed(call, error)

    def _check_origin(self, call: Call) -> None:
        """Raises Refused for a web page of another origin.

        Browsers send such a page's request, and only keep the answer from it: any page that a
        user visits could otherwise generate at a server on the user's machine.
        """
        origin = call.headers.get("origin")
        if origin is None or self._origins & {origin, ANY_ORIGIN}:
            return
        if origin.partition("://")[2] != call.headers.get("host"):
            raise Refused(f"origin {origin} is not one of http_allowed_origins", 403)

    def _endpoint(self, method: str, path: str) -> Endpoint:
        method = "GET" if method == "HEAD" else method
        paths = [
            known
            for _, known in self._endpoints
            if known == path or (known.endswith("/") and known != "/" and path.startswith(known))
        ]
        for known in paths:
            found = self._endpoints.get((method, known))
            if found is not None:
                return found
        allowed = [one for one, known in self._endpoints if known in paths]
        if allowed:
            raise Refused(f"{path} allows {', '.join(allowed)}", 405)
        raise Refused(f"there is no {path}", 404)


async def _failed(call: Call, error: Exception) -> None:
    if _is_gone(error):
        return
    answer = answer_of(error)
    if call.has_begun:
        call.abort()
    else:
        await call.answer(answer.body, answer.status, answer.retry_after_s)


def _is_gone(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_gone, error.exceptions))
    return isinstance(error, ClientGone)
