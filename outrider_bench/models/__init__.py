"""Synthetic model pairs: the cost of a real pair, a chosen acceptance rate, no download."""
