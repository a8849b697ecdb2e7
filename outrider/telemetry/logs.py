"""Logs: one line per event, as JSON or for reading on a terminal.

Events of a request carry its `request_id`, `session_id` and `trace_id`, which the handler binds
(`structlog.contextvars`) in the request's own task. Events contain counts, times and names, never
prompts, generated text or secrets.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from outrider.errors import ConfigError

# Values under these names are hidden, should one ever be logged.
_SECRETS = frozenset(
    ("api_key", "authorization", "content", "key", "messages", "password", "prompt", "secret",
     "stop", "text", "token", "token_ids")
)  # fmt: skip
HIDDEN = "(hidden)"


def configure_logs(program: str, *, level: str = "info", json: bool = False) -> None:
    """Sends events, those of libraries included, to standard error. Called once, by main.

    Raises ConfigError if the level is unknown.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"log_level: {level!r}; allowed: debug, info, warning, error")
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        without_secrets,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(program=program)
    _configure_libraries(max(number, logging.WARNING), shared, renderer)


def _configure_libraries(
    level: int, shared: list[structlog.typing.Processor], renderer: structlog.typing.Processor
) -> None:
    """Formats the log lines of libraries in the same way, so that all lines are JSON or none."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)


def without_secrets(
    logger: Any, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Processor that replaces secret values."""
    for name in _SECRETS.intersection(event):
        event[name] = HIDDEN
    return event
