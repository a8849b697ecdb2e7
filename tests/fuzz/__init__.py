"""Hostile input for all three services, sent over real gRPC while a healthy session runs beside.

`python -m tests.fuzz SERVICE` is the long version; the tests here are the short one.
"""
