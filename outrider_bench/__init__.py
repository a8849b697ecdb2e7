"""Tools around Outrider: benchmarks, load tests, chaos, synthetic pairs, quickstart training.

A distribution of its own; its commands join the `outrider` command line by entry points. No service
needs it.
"""
