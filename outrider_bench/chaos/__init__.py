"""Faults on purpose, load, and the proof that nothing was lost, repeated or changed.

Reading order: faults (what may go wrong, and when), jobs (what is asked for, and how callers
behave), nodes, system (real processes and the links between them), inject (faults into a system),
calls, client (one generation followed to its end, whatever happens), expected (what it must have
been), audit (what it was), run, own, shell (all of it together), report. Imports no service and no
torch; `outrider chaos` is its only caller.
"""
