"""One model pair for all tests of the draft's parts, on one thread."""

from __future__ import annotations

from tests.services.conftest import _few_threads, draft_greedy, greedy, pair

__all__ = ["_few_threads", "draft_greedy", "greedy", "pair"]
