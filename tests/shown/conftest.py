"""Pages are run by `make shown` alone: with real processes, for minutes."""

from __future__ import annotations

import os

collect_ignore = [] if "OUTRIDER_TEST_SHOWN" in os.environ else ["test_pages.py"]
