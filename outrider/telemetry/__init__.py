"""What the three programs say of themselves to others: metrics, traces, logs. Knows no service.

Reading order: settings, catalogue, distribution, exposition, scrapes; tracing; telemetry; logs.
What each program has to tell is put together in the program: `orchestrator.api.metrics`,
`outrider.model_server.metrics`.
"""
