"""HTTP clients of the tests: the official one, and plain requests in threads."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any

import openai

from tests.stack import Stack


def openai_client(stack: Stack, api_key: str = "none") -> openai.AsyncOpenAI:
    """The official client, without retries."""
    return openai.AsyncOpenAI(
        base_url=f"http://{stack.http_endpoint}/v1", api_key=api_key, max_retries=0, timeout=60
    )


async def get(stack: Stack, path: str, **headers: str) -> tuple[int, Any]:
    """Status and body of a GET."""
    response, content = await asyncio.to_thread(_response, stack, "GET", path, None, headers)
    return response.status, json.loads(content)


async def post(stack: Stack, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and body of a POST."""
    response, content = await asyncio.to_thread(_response, stack, "POST", path, body, headers)
    return response.status, json.loads(content)


async def events(stack: Stack, path: str, body: Any) -> list[str]:
    """Data of all events of a streamed answer."""
    response, content = await asyncio.to_thread(_response, stack, "POST", path, body, {})
    assert response.status == 200, content
    *parts, rest = content.decode().split("\n\n")
    assert not rest
    return [part.removeprefix("data: ") for part in parts]


def _response(
    stack: Stack, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[http.client.HTTPResponse, bytes]:
    host, _, port = stack.http_endpoint.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, named)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()
