"""Mathematics of speculative decoding: pure functions of arrays, without I/O, torch or state.

`random` counter-based randomness · `params` sampling parameters · `warp` logits → distribution ·
`support` truncated draft distributions · `verify` accept or reject · `formulas` expected speed-up.

Functions on large arrays use the array API, so that they work for numpy and torch.
"""
