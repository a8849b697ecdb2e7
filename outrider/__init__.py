"""Code that Outrider's three programs share: contracts, settings, sampling, engine, client, CLI.

`draft_service`, `target_service` and `orchestrator` import this package, never the reverse.
"""

import os

# gRPC's core writes its own lines to standard error, between JSON log lines. Our logs and errors
# report the same. gRPC reads this variable when it is imported; set it to see the lines.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
