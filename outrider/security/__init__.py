"""Security material of all services and of the command line: certificates, keys, API keys.

gRPC credentials are made of it in `outrider.runtime` and `outrider.client`.
"""
