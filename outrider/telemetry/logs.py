"""Logs: one line an event, JSON or for a person. Knows no service.

What belongs to a request carries its `request_id`, `session_id` and `trace_id`: whoever takes a
call binds them (`structlog.contextvars`) in the call's own task. Events are counts, times and
names: never what a caller says or is told, never a secret.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from outrider.errors import ConfigError

# Should one of these ever be logged, its value is not.
_SECRETS = frozenset(
    ("api_key", "authorization", "content", "key", "messages", "password", "prompt", "secret",
     "stop", "text", "token", "token_ids")
)  # fmt: skip
HIDDEN = "(hidden)"


def configure_logs(program: str, *, level: str = "info", json: bool = False) -> None:
    """Sends events to standard error, those of libraries too; called once, by a program's main.

    Raises ConfigError.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"log_level: {level!r} is none of debug, info, warning, error")
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
    """Their lines look like ours, so that whoever reads JSON reads nothing else."""
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
    """A processor: values that must not be seen are not."""
    for name in _SECRETS.intersection(event):
        event[name] = HIDDEN
    return event
