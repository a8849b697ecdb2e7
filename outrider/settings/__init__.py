"""Validated settings of all programs; only `loader` reads flags and environment variables.

`services` has one dataclass per service; `fields` and `addresses` have the checks that they share.
"""
