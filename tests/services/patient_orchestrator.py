"""`python -m tests.services.patient_orchestrator`: an orchestrator that waits long for its draft.

Else one that is slow to start, on a busy machine, serves without it.
"""

from __future__ import annotations

import sys

import orchestrator.app
import orchestrator.startup
from outrider.runtime.main import run_until_signalled
from outrider.settings.services import OrchestratorConfig

if __name__ == "__main__":
    orchestrator.startup.DRAFT_START_TIMEOUT_S = 60.0
    sys.exit(run_until_signalled("orchestrator", OrchestratorConfig, orchestrator.app.serving))
