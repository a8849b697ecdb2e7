"""`python -m tests.services.stuck_target`: a simulated target whose device never ends a long pass.

Calibration uses fewer tokens, so it ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from outrider.engine import Append
from outrider.engine.simulated import SimulatedEngine
from outrider.runtime.main import run_until_signalled
from outrider.settings.services import TargetConfig
from target_service.app import serving

NUM_TOKENS = 1_000

_forward = SimulatedEngine.forward


def _stuck(self: SimulatedEngine, appends: Sequence[Append]) -> None:
    if sum(len(append.token_ids) for append in appends) >= NUM_TOKENS:
        threading.Event().wait()
    _forward(self, appends)


if __name__ == "__main__":
    SimulatedEngine.forward = _stuck  # type: ignore[method-assign]
    sys.exit(run_until_signalled("target", TargetConfig, serving))
