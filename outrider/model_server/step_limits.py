"""Limits of one forward pass: tokens, and rows of logits. Lowered when memory runs out.

The limits do not rise again: what did not fit once would fail requests again. A restarted replica
begins with its settings.
"""

from __future__ import annotations

import structlog

from outrider.errors import InternalError, StepOutOfMemory

log = structlog.get_logger()

# Smallest limit of tokens to lower to: below, a prompt would take a pass for every few tokens.
_LEAST_TOKENS = 16


class StepLimits:
    """Largest pass of a replica. Lives on the device thread.

    `max_tokens` limits prompts, which run in chunks; `max_rows` limits rows of logits, each as wide
    as the vocabulary. A pass always has room for one verify request, and one row for a prompt.
    """

    def __init__(self, max_tokens: int, max_rows: int, max_gamma: int) -> None:
        self._least_rows = 2 * (1 + max_gamma)
        self.max_tokens = max_tokens
        self.max_rows = max(max_rows, self._least_rows)
        self.num_exceeded = 0
        """Passes that ran out of memory."""

    def after(self, error: Exception) -> Exception:
        """The error to report for a failed pass; lowers the limits if memory ran out.

        InternalError if they are as low as possible: the device is not usable any more.
        """
        if not isinstance(error, StepOutOfMemory):
            return error
        self.num_exceeded += 1
        former = self.max_tokens, self.max_rows
        if error.num_tokens:
            self.max_tokens = _lowered(self.max_tokens, error.num_tokens, _LEAST_TOKENS)
        self.max_rows = _lowered(self.max_rows, error.num_rows, self._least_rows)
        log.warning(
            "step_out_of_memory",
            num_tokens=error.num_tokens,
            num_rows=error.num_rows,
            max_step_tokens=self.max_tokens,
            max_step_rows=self.max_rows,
            why=str(error),
        )
        if (self.max_tokens, self.max_rows) == former:
            return InternalError("the smallest pass does not fit into memory", str(error))
        return error


def _lowered(limit: int, size: int, least: int) -> int:
    """Half of the limit, or of the size that did not fit if that is smaller; at least `least`."""
    return min(limit, max(min(limit, size) // 2, least))
