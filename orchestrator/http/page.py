"""The page at `/`: its files, and the replicas that it shows.

The files are in `static`. They load nothing from elsewhere and contain no data: what they show
comes from the other endpoints, with the API key that the visitor enters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from orchestrator.generation.context import GenerationContext
from orchestrator.http.calls import Call
from orchestrator.replicas.replica_stream import ReplicaLink
from outrider.draft_rollout import revision_name

REPLICAS = "/v1/replicas"
_FOLDER = "/page/"
_INDEX = "index.html"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# Only our own files, and calls to our own endpoints.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # the browser asks whether its copy is current
]


@dataclass(frozen=True)
class PageFile:
    """One file of the page, as an endpoint."""

    path: str
    content: bytes
    content_type: bytes

    async def __call__(self, call: Call) -> None:
        tag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'
        is_current = call.headers.get("if-none-match") == tag
        headers = [*_HEADERS, (b"etag", tag.encode())]
        body = b"" if is_current else self.content
        if not is_current:
            headers += [
                (b"content-type", self.content_type),
                (b"content-length", str(len(body)).encode()),
            ]
        status = 304 if is_current else 200
        await call.send({"type": "http.response.start", "status": status, "headers": headers})
        await call.send({"type": "http.response.body", "body": body})


def page_files() -> Iterator[PageFile]:
    """All files of the page; `/` is the page itself."""
    for file in files("orchestrator.http").joinpath("static").iterdir():
        kind = _TYPES.get(PurePath(file.name).suffix)
        if kind is not None:
            path = "/" if file.name == _INDEX else f"{_FOLDER}{file.name}"
            yield PageFile(path, file.read_bytes(), kind)


class Replicas:
    """Endpoint `/v1/replicas`: the replicas of both tiers, as this orchestrator sees them."""

    def __init__(self, context: GenerationContext) -> None:
        self._context = context

    async def __call__(self, call: Call) -> None:
        pools = (self._context.targets, self._context.drafts)
        links = [link for pool in pools if pool is not None for link in pool.links.values()]
        await call.answer({"object": "list", "data": [self._entry(link) for link in links]})

    def _entry(self, link: ReplicaLink[Any, Any]) -> dict[str, Any]:
        """`num_generations`: all there; `num_own_generations`: those of this orchestrator."""
        model, costs = link.model, link.costs
        return {
            "tier": link.tier,
            "address": link.endpoint,
            "state": link.condition,
            "refused": link.refusal.why or None,
            "model": None if model is None else model.name,
            "device": None if model is None else model.device,
            "num_generations": link.load,
            "num_own_generations": link.num_open,
            "kv_capacity_tokens": None if model is None else model.kv_capacity_tokens,
            "step_ms": None if model is None else 1e3 * costs.pass_s(1, 1),
            "mean_num_rows": None if model is None else costs.mean_num_rows,
            "acceptance_rate": self._acceptance_rate(link),
        }

    def _acceptance_rate(self, link: ReplicaLink[Any, Any]) -> float | None:
        """α of a draft's model at this orchestrator; None: of a target, or not known yet."""
        rollout = self._context.rollout
        if link.tier != "draft" or link.model is None or rollout is None:
            return None
        counts = rollout.counts.get(revision_name(link.model.model_fingerprint))
        if counts is None:
            return None
        num_verified = counts.num_accepted_tokens + counts.num_rejected_tokens
        return counts.num_accepted_tokens / num_verified if num_verified else None
