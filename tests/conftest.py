"""Settings of all tests.

Hypothesis tries the same examples in every run, however slow the machine is at that moment, so
that a green run stays green; `pytest --hypothesis-profile=default` explores anew.
"""

from __future__ import annotations

import gc
import os
from collections import Counter

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


# One thread in this process and in programs that tests start; torch reads it when it is imported.
# Workers share the cores, and two threads of a small model wait for each other, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Collecting imports torch and every test: full collections of that garbage, none of which can be
# freed, would take seconds of each worker.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, as rarely as in the services.

    What was imported is not looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by file, the one with the most slow tests first: none of those is left for the end."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])
