"""Python client of an orchestrator: channels with TLS and API key, requests, resume."""
