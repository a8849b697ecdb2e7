"""Telemetry of the three programs: metrics, traces, logs.

Reading order: settings, metric, catalogue, distribution, exposition, scrapes; tracing; telemetry;
logs.
Each program collects its own metrics: `orchestrator.api.metrics`, `outrider.model_server.metrics`.
"""
