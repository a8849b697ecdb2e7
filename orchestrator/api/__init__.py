"""The orchestrator's API: the generate use case, its gRPC transport, metrics of requests.

An HTTP front end would be a second transport beside `grpc_server`, over `generate`.
"""
