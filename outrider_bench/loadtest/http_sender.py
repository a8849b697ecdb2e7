"""Requests of a load test over OpenAI's HTTP: translates to and from JSON and events.

Needs aiohttp, of the extra `bench`.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from typing import Any

import aiohttp

from outrider.client.channel import Access
from outrider.errors import CallFailed
from outrider_bench.loadtest.records import OK, Chunk, Record, Speculation
from outrider_bench.loadtest.requests import LoadRequest

_SHORT_TIMEOUT = aiohttp.ClientTimeout(total=10)
# A line is an event; the last one of an output with many log-probabilities is the longest.
_MAX_LINE_BYTES = 1 << 20


def http_session(access: Access) -> aiohttp.ClientSession:
    """A session without a limit of connections. Raises OSError for a file of `access`."""
    context: ssl.SSLContext | bool = True
    if access.tls_ca is not None or access.tls_cert is not None:
        context = ssl.create_default_context(cafile=access.tls_ca)
        if access.tls_cert is not None:
            context.load_cert_chain(access.tls_cert, access.tls_key)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=context),
        headers={"authorization": f"Bearer {access.api_key}"} if access.api_key else {},
        read_bufsize=_MAX_LINE_BYTES,
    )


async def get_json(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """The JSON object at a URL. Raises CallFailed."""
    try:
        async with session.get(url, timeout=_SHORT_TIMEOUT) as response:
            body = await response.json(content_type=None)
            if response.status == 200 and isinstance(body, dict):
                return body
            raise CallFailed(f"GET {url}: {_status(response.status)}: {_message_of(body)}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise CallFailed(f"GET {url}: {error or 'no answer within 10 s'}") from error


class HttpSender:
    """Sends requests for one model to the service at a URL such as http://127.0.0.1:8000."""

    keeps_sessions = False

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url
        self._model = model

    async def send(self, request: LoadRequest, record: Record, now_s: Callable[[], float]) -> str:
        """Sends the request and notes its events; see `Sender`."""
        path = "/v1/chat/completions" if request.messages else "/v1/completions"
        texts: list[str] = []
        try:
            async with self._session.post(
                self._url + path,
                json=_body(request, self._model),
                timeout=aiohttp.ClientTimeout(total=request.options.timeout_s),
            ) as response:
                if response.status == 200:
                    await _note_events(record, response.content, now_s, texts)
                else:
                    await _note_refusal(record, response)
        except TimeoutError:
            record.status = "DEADLINE_EXCEEDED"
        except (aiohttp.ClientError, ValueError) as error:
            record.status, record.detail = "UNAVAILABLE", str(error) or type(error).__name__
        return "".join(texts)

    async def delete_session(self, session_id: str) -> None:
        raise AssertionError("there are no sessions")


def _body(request: LoadRequest, model: str) -> dict[str, Any]:
    job, options = request.job, request.options
    prompt = list(request.token_ids) if job.text is None else job.text
    verification = options.verification
    fields = {
        "model": model,
        "max_tokens": job.max_tokens,
        "seed": request.seed,
        "temperature": options.temperature,
        "ignore_eos": True if options.ignores_eos else None,
        "priority": job.priority,
        "gamma": options.gamma,
        "lookahead": options.lookahead,
        "fan_out": options.fan_out,
        "verification": None if verification is None else verification.name.lower(),
        "durability": "fast" if options.is_fast else None,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    fields |= {"messages": list(request.messages)} if request.messages else {"prompt": prompt}
    return {name: value for name, value in fields.items() if value is not None}


async def _note_events(
    record: Record,
    lines: aiohttp.StreamReader,
    now_s: Callable[[], float],
    texts: list[str],
) -> None:
    is_done = False
    async for line in lines:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            is_done = True  # read on: a connection is used again only after the body's end
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            error = event["error"]
            record.status = _status(error.get("code"))
            record.detail = _message_of(event)
            continue
        texts += _note_event(record, event, now_s())
    if record.detail:
        return
    record.status = OK if record.finish_reason else "NO_RESULT"
    if not is_done:
        record.status, record.detail = "UNAVAILABLE", "the connection was closed in mid-stream"


def _note_event(record: Record, event: dict[str, Any], at_s: float) -> list[str]:
    """Adds an event, received at `at_s`, to the record. Returns its texts."""
    usage = event.get("usage") or {}
    num_new = usage.get("completion_tokens", 0) - record.num_tokens
    if num_new > 0:
        record.chunks.append(Chunk(at_s, num_new))
    texts = []
    for choice in event.get("choices", ()):
        texts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
        if choice.get("finish_reason"):
            record.finish_reason, record.ended_s = choice["finish_reason"], at_s
    if usage:
        # Only the service knows the number of tokens of a text.
        record.prompt_len = record.prompt_len or usage.get("prompt_tokens", 0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        record.num_cached_tokens = cached or record.num_cached_tokens
    if stats := (event.get("metrics") or {}).get("speculative_decoding"):
        record.ended_s = at_s
        record.speculation = _speculation(stats)
    return texts


def _speculation(stats: dict[str, Any]) -> Speculation:
    histogram = stats["acceptance_histogram"]
    return Speculation(
        num_drafts=stats["num_spec_steps"],
        num_draft_tokens=stats["num_draft_tokens"],
        num_accepted_tokens=stats["num_accepted_draft_tokens"],
        num_rejected_tokens=stats["num_rejected_draft_tokens"],
        num_rounds=stats["num_rounds"],
        num_lookahead_hits=stats["num_lookahead_hits"],
        num_accepted_per_pos=tuple(
            num for i in range(1, len(histogram)) if (num := sum(histogram[i:]))
        ),
        num_rounds_per_gamma=tuple(stats["num_rounds_per_gamma"]),
    )


async def _note_refusal(record: Record, response: aiohttp.ClientResponse) -> None:
    record.status = _status(response.status)
    content = await response.text(errors="replace")
    try:
        record.detail = _message_of(json.loads(content))
    except ValueError:
        record.detail = " ".join(content.split())[:300]
    if (after := response.headers.get("retry-after", "")).isdigit():
        record.retry_after_s = float(after)


def _status(code: int | str | None) -> str:
    return f"HTTP {code}" if code else "ERROR"


def _message_of(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or body).split())[:300]
