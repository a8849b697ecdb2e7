"""Validated settings of all programs; `loader` is the only reader of flags and environment.

`services` has one dataclass for each service; `fields` has the checks they share.
"""
