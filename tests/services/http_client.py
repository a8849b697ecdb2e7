"""HTTP clients of the tests: the official one, and plain requests in threads."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
from typing import Any, NamedTuple

import openai

from tests.stack import Stack


def openai_client(stack: Stack, api_key: str = "none") -> openai.AsyncOpenAI:
    """The official client, without retries."""
    return openai.AsyncOpenAI(
        base_url=f"http://{stack.http_endpoint}/v1", api_key=api_key, max_retries=0, timeout=60
    )


class Answer(NamedTuple):
    """Answer of a call; `headers`: names in lower case."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


async def asked(
    endpoint: str,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> Answer:
    """A call with a connection of its own; `context`: with TLS."""
    return await asyncio.to_thread(_asked, endpoint, method, path, body, headers or {}, context)


def _asked(
    endpoint: str,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    context: ssl.SSLContext | None,
) -> Answer:
    host, _, port = endpoint.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    if context is not None:
        connection = http.client.HTTPSConnection(host, int(port), timeout=60, context=context)
    try:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, named, response.read())
    finally:
        connection.close()


async def get(stack: Stack, path: str) -> tuple[int, Any]:
    """Status and body of a GET."""
    answer = await asked(stack.http_endpoint, "GET", path)
    return answer.status, answer.body


async def post(stack: Stack, path: str, body: Any) -> tuple[int, Any]:
    """Status and body of a POST."""
    answer = await asked(stack.http_endpoint, "POST", path, body)
    return answer.status, answer.body


async def events(stack: Stack, path: str, body: Any) -> list[str]:
    """Data of all events of a streamed answer."""
    answer = await asked(stack.http_endpoint, "POST", path, body)
    assert answer.status == 200, answer
    *parts, rest = answer.content.decode().split("\n\n")
    assert not rest
    return [part.removeprefix("data: ") for part in parts]
