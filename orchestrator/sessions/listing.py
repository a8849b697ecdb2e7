"""List of a client's sessions, page by page, found by a scan of the keys of all clients."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from orchestrator.sessions.codec import malformed, refuse, unpack_count, unpack_text
from orchestrator.sessions.lua import Script
from orchestrator.sessions.records import scoped_id
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import InvalidRequest, UnreadableRecord

log = structlog.get_logger()

# Keys that one SCAN command looks at, in about 1 ms.
_SCAN_COUNT = 500
_SCANS_PER_PAGE = 50
# Unreadable sessions of a page that the log names; `count` is the number of all of them.
_MAX_LOGGED = 5

# Does not read the messages and the last request, which may be long: if only these are malformed,
# the session is listed. A session of a newer layout is listed if the fields below can be read.
SUMMARY = Script("""
local refused = unreadable()
if refused and refused[1] ~= 'newer' then return refused end
local had = redis.call('HMGET', key, 'num_tokens', 'num_turns', 'model')
if not had[1] then return {'not_found'} end
return {'ok', redis.call('PTTL', key), in_use() and 1 or 0, had[1], had[2] or '0', had[3] or ''}
""")


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session in a list, without its tokens."""

    session_id: str
    num_tokens: int
    num_turns: int
    in_use: bool
    expires_in_s: float


@dataclass(frozen=True, slots=True)
class SessionPage:
    """Part of the list of a client's sessions."""

    sessions: Sequence[SessionSummary]
    num_unreadable: int
    """Session keys of this page without a readable session; `sessions` leaves them out."""
    cursor: int
    """Cursor of the next page; 0: this is the last page."""


async def scan(
    writer: PipelineWriter, prefix: str, cursor: int, client: str
) -> tuple[list[str], int]:
    """Some session names, and Redis' cursor behind them; 0 begins and ends. Raises Unavailable.

    The list may be empty before the end if other clients have many keys: one page never takes
    seconds.
    """
    start = f"{prefix}:session:{{{scoped_id('', client)}".encode()
    names: list[str] = []
    for _ in range(_SCANS_PER_PAGE):
        reply = await writer.command(
            b"SCAN", b"%d" % cursor, b"MATCH", start + b"*}", b"COUNT", b"%d" % _SCAN_COUNT
        )
        cursor = int(reply[0])
        # A key that is not UTF-8 gets a name that no session can have.
        found = {
            key.removeprefix(start).removesuffix(b"}").decode(errors="backslashreplace")
            for key in reply[1]
        }
        # The prefix of the unnamed client also matches `client/session` of named ones.
        names = sorted(name for name in found if "/" not in name)
        if names or not cursor:
            break
    return names, cursor


async def read_page(
    names: Sequence[str],
    cursor: int,
    summarize: Callable[[str], Awaitable[Sequence[Any]]],
) -> SessionPage:
    """Summaries of `names`; `summarize` returns the reply of SUMMARY for one.

    Logs and counts names without a readable session. Leaves out sessions that have expired. Raises
    any other error of `summarize`.
    """

    async def summary(name: str) -> SessionSummary | None:
        return _unpack_summary(name, await summarize(name))

    found = await asyncio.gather(*map(summary, names), return_exceptions=True)
    sessions: list[SessionSummary] = []
    unreadable: dict[str, str] = {}
    for name, one in zip(names, found, strict=True):
        if isinstance(one, UnreadableRecord | InvalidRequest):
            unreadable[name] = str(one)
        elif isinstance(one, BaseException):
            raise one
        elif one is not None:
            sessions.append(one)
    if unreadable:
        first = dict(itertools.islice(unreadable.items(), _MAX_LOGGED))
        log.warning("unreadable_sessions", count=len(unreadable), first=first)
    return SessionPage(sessions, len(unreadable), cursor)


def _unpack_summary(session_id: str, reply: Sequence[Any]) -> SessionSummary | None:
    """None: the session does not exist. Raises UnreadableRecord."""
    status, *rest = reply
    if status == b"not_found":
        return None
    if status != b"ok":
        refuse(status, rest, session_id)
    remaining_ms, in_use, num_tokens, num_turns, model = rest
    with malformed(session_id):
        unpack_text("model", model)
        return SessionSummary(
            session_id,
            unpack_count("num_tokens", num_tokens),
            unpack_count("num_turns", num_turns),
            bool(in_use),
            expires_in_s=max(0, remaining_ms) / 1000,
        )
