"""Load tests of an orchestrator: who asks when, for what, and what the callers lived through.

A pure core and one edge. Reading order: lengths, arrivals, trace, plan (what is sent when);
records, stretches, slo, measures (what it meant); sweep, results, page (what is said of it); then
the edge: asking (the requests), driver (the calls and their clock), campaign (phases, with
speculation and without). Knows no terminal and starts no service: `outrider_bench.commands` does.
"""
