"""Who may run a generation, and when: API keys, quotas, session limits, the admission queue."""
