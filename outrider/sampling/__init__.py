"""The mathematics of speculative decoding: pure functions of arrays, no I/O, no torch, no state.

`random` counter-based randomness · `params` sampling parameters · `warp` logits → distribution ·
`support` truncated draft distributions · `verify` accept or reject · `formulas` what to expect.

Functions on large arrays are written once against the array API and serve numpy and torch alike.
"""
