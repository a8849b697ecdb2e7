"""Code shared by the two model services: lifecycle, continuous batching, session KV, streams.

`draft_service` and `target_service` build their workers and gRPC servicers on it.
"""
