"""`python -m target_service`: serves one model as the target tier until SIGTERM."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager

from outrider.runtime.grpc_server import Server
from outrider.runtime.main import run_until_signalled
from outrider.settings.services import TargetConfig


def _serving(config: TargetConfig) -> AbstractAsyncContextManager[Server]:
    # Imports torch, which takes seconds; settings are validated before that.
    from target_service.app import serving

    return serving(config)


if __name__ == "__main__":
    sys.exit(run_until_signalled("target", TargetConfig, _serving))
