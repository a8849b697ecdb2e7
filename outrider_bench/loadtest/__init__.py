"""Load test of an orchestrator: plan of requests, measurement, metrics, results.

A pure core and one edge. Reading order: lengths, arrivals, trace, plan (what is sent when);
records, phase_results, slo, measures (metrics); sweep, results, page (output); then the edge:
requests, grpc_sender and http_sender (one per transport), driver (calls and their times), campaign
(phases with and without speculation).
`outrider_bench.commands` owns the command line and starts services.
"""
