"""`python -m draft_service`: serves one model as the draft tier until SIGTERM."""

from __future__ import annotations

import sys

from draft_service.service import serving
from outrider.config import DraftConfig
from outrider.program import run_until_signalled

if __name__ == "__main__":
    sys.exit(run_until_signalled("draft", DraftConfig, serving))
