"""Sampling from logits, batched: distributions, logits processors and Gumbel-max."""
