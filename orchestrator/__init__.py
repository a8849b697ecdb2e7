"""The orchestrator: sessions, rounds, streams. Knows the other tiers by their contracts only."""
