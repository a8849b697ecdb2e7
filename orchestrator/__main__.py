"""`python -m orchestrator`: serves Generate until SIGTERM."""

from __future__ import annotations

import sys

from orchestrator.app import serving
from outrider.runtime.main import run_until_signalled
from outrider.settings.services import OrchestratorConfig

if __name__ == "__main__":
    sys.exit(run_until_signalled("orchestrator", OrchestratorConfig, serving))
