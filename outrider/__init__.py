"""What Outrider's three programs share: contracts, errors, configuration, mathematics, engine, CLI.

Knows no service: `draft_service`, `target_service` and `orchestrator` import it, never the reverse.
"""

import os

# gRPC's core writes lines to standard error, in the midst of JSON logs. What they say our own
# logs and errors say as well. It reads this as it is imported: whoever wants the lines sets it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
