"""`python -m orchestrator`: answers Generate until SIGTERM."""

from __future__ import annotations

import sys

from orchestrator.service import serving
from outrider.config import OrchestratorConfig
from outrider.program import run_until_signalled

if __name__ == "__main__":
    sys.exit(run_until_signalled("orchestrator", OrchestratorConfig, serving))
