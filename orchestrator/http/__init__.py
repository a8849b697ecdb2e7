"""HTTP transport with OpenAI's endpoints, beside gRPC and over the same use case.

Only `orchestrator.app` imports it, and only if `http_port` is set: the import takes 0.15 s.
"""
