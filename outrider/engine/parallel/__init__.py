"""Tensor parallelism: one model over several processes (ranks), each with a part of every layer."""
