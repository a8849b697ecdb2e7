"""Chaos testing: load under injected faults, and a check that no token is lost, repeated or
changed.

Reading order: faults (types of faults and their schedule), jobs (requests and client behaviour),
nodes, system (real processes and the links between them), inject (injects faults into a system),
calls, client (one generation, followed to its end), reference (expected outputs), audit (compares),
run, own_system, shell (put these together), report. Imports no service and no torch. `outrider
chaos` is its only user.
"""
