"""The models and the running system of the tests of the command line."""

from __future__ import annotations

from tests.cli.conftest import draft, endpoint, running, target

__all__ = ["draft", "endpoint", "running", "target"]
