"""Speculation tree of one generation: blocks of draft tokens, their KV branches, the row budget."""
