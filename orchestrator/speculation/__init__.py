"""Speculation: verification of draft tokens, acceptance model, round costs, choice of γ. Pure."""
