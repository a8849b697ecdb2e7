"""Admission of requests: API keys, quotas, session limits, and the queue of generations."""
