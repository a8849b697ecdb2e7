"""What the two model services share around an engine: their life, continuous batching, sessions.

Knows neither rows nor chains; `draft_service` and `target_service` build on it.
"""
