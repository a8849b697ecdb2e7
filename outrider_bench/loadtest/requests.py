"""Requests of a load test, and what sends them: one sender per connection and transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider.sampling.params import Verification
from outrider_bench.loadtest.plan import Job
from outrider_bench.loadtest.records import Record


@dataclass(frozen=True)
class RequestOptions:
    """Options of all requests of a variant. None: the server's default.

    `ignores_eos`: outputs have the requested length. `is_chat`: prompts are messages of a user.
    """

    gamma: int | None = None
    lookahead: int | None = None
    fan_out: int | None = None
    temperature: float | None = 0.0
    verification: Verification | None = None
    is_fast: bool = False
    ignores_eos: bool = True
    timeout_s: float | None = None
    is_chat: bool = False


@dataclass(frozen=True)
class LoadRequest:
    """One request to send. The prompt: `messages` of a chat, else the job's text, else `token_ids`.

    `messages`: role and content of each, with those of earlier turns. `session_id`: empty without a
    session.
    """

    job: Job
    options: RequestOptions
    seed: int
    session_id: str = ""
    token_ids: Sequence[int] = ()
    messages: Sequence[Mapping[str, str]] = ()


class Sender(Protocol):
    """Sends requests over one connection."""

    keeps_sessions: bool
    """Whether the service remembers the turns of a session; otherwise each turn repeats them."""

    async def send(self, request: LoadRequest, record: Record, now_s: Callable[[], float]) -> str:
        """Sends the request, notes its messages or its failure, and returns the output's text.

        Failures of the service are noted, not raised.
        """

    async def delete_session(self, session_id: str) -> None:
        """Deletes a session. If that fails, it expires later."""
