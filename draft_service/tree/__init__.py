"""Speculation trees: blocks of draft tokens, their KV branches, acceptance model, row budget."""
