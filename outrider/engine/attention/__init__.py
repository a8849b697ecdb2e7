"""Attention over packed sequences: the interface, its back ends, and the choice between them."""
