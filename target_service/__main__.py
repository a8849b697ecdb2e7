"""`python -m target_service`: serves one model as the target tier until SIGTERM."""

from __future__ import annotations

import sys

from outrider.config import TargetConfig
from outrider.program import run_until_signalled
from target_service.service import serving

if __name__ == "__main__":
    sys.exit(run_until_signalled("target", TargetConfig, serving))
