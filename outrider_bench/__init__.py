"""Benchmarks, load tests, chaos tests, synthetic model pairs and training of the quickstart pair.

A separate distribution. Its commands join the `outrider` command line through entry points. No
service imports it.
"""
