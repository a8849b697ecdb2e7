"""`python -m draft_service`: serves one model as the draft tier until SIGTERM."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager

from outrider.config import DraftConfig
from outrider.program import run_until_signalled
from outrider.server import Server


def _serving(config: DraftConfig) -> AbstractAsyncContextManager[Server]:
    # Imports torch, which takes seconds: a wrong setting is told before that.
    from draft_service.service import serving

    return serving(config)


if __name__ == "__main__":
    sys.exit(run_until_signalled("draft", DraftConfig, _serving))
