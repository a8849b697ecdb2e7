"""Fixtures of the command-line tests: models and a running system."""

from __future__ import annotations

from tests.cli.conftest import draft, endpoint, running, target

__all__ = ["draft", "endpoint", "running", "target"]
