"""The orchestrator's API: the generate use case, its gRPC transport, metrics of requests."""
