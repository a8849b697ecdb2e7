"""Names of a caller's sessions, found among the keys of all callers, page by page."""

from __future__ import annotations

from orchestrator.store.records import scoped_id
from orchestrator.store.writer import PipelineWriter

# Keys that Redis looks at in one command, in about a millisecond; and such commands for one page.
_SCAN_COUNT = 500
_SCANS_PER_PAGE = 50


async def scan(
    writer: PipelineWriter, prefix: str, cursor: int, caller: str
) -> tuple[list[str], int]:
    """Some names, and Redis' cursor behind them; 0 begins and ends. Raises Unavailable.

    A page may be empty where the keys of others are many: it never takes seconds.
    """
    start = f"{prefix}:session:{{{scoped_id('', caller)}".encode()
    names: list[str] = []
    for _ in range(_SCANS_PER_PAGE):
        reply = await writer.command(
            b"SCAN", b"%d" % cursor, b"MATCH", start + b"*}", b"COUNT", b"%d" % _SCAN_COUNT
        )
        cursor = int(reply[0])
        found = {key.removeprefix(start).removesuffix(b"}").decode() for key in reply[1]}
        # Without a name of its own, a caller would see those of named ones: `caller/session`.
        names = sorted(name for name in found if "/" not in name)
        if names or not cursor:
            break
    return names, cursor
