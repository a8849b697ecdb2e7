"""The orchestrator's transports: requests to values, chunks to responses, metrics of calls."""
