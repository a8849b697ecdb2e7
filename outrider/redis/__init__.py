"""Redis access: connection, registry of replicas, embedded server for `outrider up` and tests.

The only package that imports the redis library. Session records are in `orchestrator.sessions`.
"""
