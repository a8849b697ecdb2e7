"""List of a caller's sessions, found among the keys of all callers, page by page."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import structlog

from orchestrator.sessions.records import SessionPage, SessionSummary, scoped_id
from orchestrator.sessions.writer import PipelineWriter
from outrider.errors import InvalidRequest, UnreadableRecord

log = structlog.get_logger()

# Keys that Redis looks at in one command, in about a millisecond; and such commands for one page.
_SCAN_COUNT = 500
_SCANS_PER_PAGE = 50
# Unreadable sessions of one page that the log names; it has the number of all.
_MAX_LOGGED = 5


async def scan(
    writer: PipelineWriter, prefix: str, cursor: int, client: str
) -> tuple[list[str], int]:
    """Some names, and Redis' cursor behind them; 0 begins and ends. Raises Unavailable.

    A page may be empty where the keys of others are many: it never takes seconds.
    """
    start = f"{prefix}:session:{{{scoped_id('', client)}".encode()
    names: list[str] = []
    for _ in range(_SCANS_PER_PAGE):
        reply = await writer.command(
            b"SCAN", b"%d" % cursor, b"MATCH", start + b"*}", b"COUNT", b"%d" % _SCAN_COUNT
        )
        cursor = int(reply[0])
        # A key that is not UTF-8 is no session's; it gets a name that no session can have.
        found = {
            key.removeprefix(start).removesuffix(b"}").decode(errors="backslashreplace")
            for key in reply[1]
        }
        # Without a name of its own, a caller would see those of named ones: `caller/session`.
        names = sorted(name for name in found if "/" not in name)
        if names or not cursor:
            break
    return names, cursor


async def read_page(
    names: Sequence[str],
    cursor: int,
    summary: Callable[[str], Awaitable[SessionSummary | None]],
) -> SessionPage:
    """Reads the summaries of `names`; `summary` returns None for a session that has expired.

    Logs and counts names whose key holds no readable session. Raises any other error of `summary`.
    """
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
