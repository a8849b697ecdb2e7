"""What Outrider's three programs share: contracts, errors, configuration, mathematics, engine, CLI.

Knows no service: `draft_service`, `target_service` and `orchestrator` import it, never the reverse.
"""

__version__ = "0.1.0"
